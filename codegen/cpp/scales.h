// Scales and zero points of a weight in tiles of 16 rows: `tile` and `group` say which, `p` which vector of the tile.

// Numbers of 8 bits as they are stored: a power of two, a float with 4 bits of exponent and 3 of mantissa, an integer.
struct e8m0 { uint8_t bits; };
struct e4m3 { uint8_t bits; };
struct whole8 { int8_t number; };

template <> struct Stored<e8m0> { typedef Bytes Vector; };
template <> struct Stored<e4m3> { typedef Bytes Vector; };
template <> struct Stored<whole8> { typedef Bytes Vector; };

// The exponent of a float; 2^-127 is below its normal numbers, and 255 is no number.
static inline Floats widen(Bytes bits, const e8m0*) {
    const Ints power = lanes_of(bits);
    return reinterpret_cast<Floats>(power << 23 | ((power == 0) | (power == 255)) & 0x00400000);
}

// Floats of the bytes in the low bits of lanes: exponent and mantissa go to a float's place, times the difference of the biases.
static inline Floats widen_e4m3(Ints bits) {
    const Ints magnitude = bits & 127;
    const Floats value = reinterpret_cast<Floats>(magnitude << 20) * 0x1p120f;
    const Ints none = (magnitude == 127) & 0x7fc00000;
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(value) | none | (bits & 128) << 24);
}

static inline Floats widen(Bytes bits, const e4m3*) { return widen_e4m3(lanes_of(bits)); }

static inline Floats widen(Bytes bits, const whole8*) {
    return __builtin_convertvector(lanes_of(bits) << 24 >> 24, Floats);
}

// Scales that stand for themselves.
template <class T>
struct TileScales {
    const T* from;
    int64_t groups;
    Floats at(int64_t tile, int64_t group, int p) const { return load(from + (tile * groups + group) * TILE + p * LANES); }
    float of(int64_t row, int64_t group) const { return get(from + (row / TILE * groups + group) * TILE + row % TILE); }
};

// Integers with a scale of their own for every `run` groups, `runs` of them in a row.
struct ScaledScales {
    const whole8* from;
    const fp16* above;
    int64_t groups, run, runs;
    Floats at(int64_t tile, int64_t group, int p) const {
        return load(from + (tile * groups + group) * TILE + p * LANES) * load(above + (tile * runs + group / run) * TILE + p * LANES);
    }
    float of(int64_t row, int64_t group) const {
        const int64_t tile = row / TILE, lane = row % TILE;
        return get(from + (tile * groups + group) * TILE + lane) * get(above + (tile * runs + group / run) * TILE + lane);
    }
};

// Floats of 8 bits with one scale for the whole matrix.
struct MatrixScales {
    const e4m3* from;
    const float* above;
    int64_t groups;
    Floats at(int64_t tile, int64_t group, int p) const {
        return load(from + (tile * groups + group) * TILE + p * LANES) * splat(*above);
    }
    float of(int64_t row, int64_t group) const {
        return get(from + (row / TILE * groups + group) * TILE + row % TILE) * *above;
    }
};

// No zero points: the middle code is 0.
struct NoZeros {
    static constexpr bool MOVED = false, LEAST = false;
    Floats at(int64_t, int64_t, int) const { return Floats{}; }
    float of(int64_t, int64_t) const { return 0.0f; }
};

// Codes that stand for 0, `groups` of them in a row, as differences from the middle code.
template <int middle>
struct ZeroCodes {
    static constexpr bool MOVED = true, LEAST = false;
    const uint8_t* from;
    int64_t groups;
    Floats at(int64_t tile, int64_t group, int p) const {
        const Bytes bytes = load_bits<Bytes>(from + (tile * groups + group) * TILE + p * LANES);
        return __builtin_convertvector(lanes_of(bytes) - middle, Floats);
    }
    float of(int64_t row, int64_t group) const { return from[(row / TILE * groups + group) * TILE + row % TILE] - middle; }
};

// What code 0 stands for.
template <class T>
struct TileMinima : TileScales<T> {
    static constexpr bool MOVED = false, LEAST = true;
};

// A weight [rows, columns] in tiles: its codes, and what turns them into numbers, for every `group` columns (0: for all of a row).
template <class Codes, int64_t group, class Scale, class Zero>
struct TileWeight {
    typedef Codes Kind;
    static constexpr int64_t GROUP = group;
    static constexpr bool MOVED = Zero::MOVED, LEAST = Zero::LEAST;
    const int32_t* codes;
    Scale scale;
    Zero zero;
    int64_t rows, columns;
};

// `total` plus the bias, as results of ROWS rows from `row` on, of tiles that are `apart`.
template <int ROWS, int TILES, class Kind, class T>
static inline void put_tiles(
    const Floats (&total)[ROWS][TILES][PARTS], const Kind& weight, const T* bias, const Tensor& out, int64_t row, int64_t tile, int64_t apart) {
    UNROLL for (int t = 0; t < TILES; t++)
        UNROLL for (int p = 0; p < PARTS; p++) {
            const int64_t first = (tile + t * apart) * TILE + p * LANES, count = std::min<int64_t>(LANES, weight.rows - first);
            if (count <= 0) continue;
            const Floats shift = bias ? load(bias + first, count) : Floats{};
            UNROLL for (int r = 0; r < ROWS; r++) store(out.row<T>(row + r) + first, total[r][t][p] + shift, count);
        }
}

// Row `row` of the matrix that a weight stands for, as its definition rounds it.
template <class Kind, class T>
static void row_of_tiles(const Kind& weight, int64_t row, T* to) {
    typedef typename Kind::Kind Codes;
    const int64_t blocks = (weight.columns + Codes::BLOCK - 1) / Codes::BLOCK, size = Kind::GROUP ? Kind::GROUP : weight.columns;
    const int32_t* from = weight.codes + row / TILE * blocks * Codes::WORDS * TILE + row % TILE;
    float line[LANES];
    int64_t group = -1;
    float scale = 0.0f, zero = 0.0f;
    for (int64_t block = 0; block < blocks; block++, from += Codes::WORDS * TILE) {
        uint32_t words[Codes::WORDS];
        uint8_t codes[Codes::BLOCK];
        for (int w = 0; w < Codes::WORDS; w++) words[w] = from[w * TILE];
        for (int q = 0; q < Codes::QUADS; q++) {
            const uint32_t part = Planes<Codes::BITS>::part(words, q);
            for (int i = 0; i < 4; i++) codes[4 * q + i] = part >> 8 * i;
        }
        for (int64_t column = block * Codes::BLOCK, end = std::min(weight.columns, column + Codes::BLOCK); column < end; column++) {
            if (column / size != group) {
                group = column / size;
                scale = weight.scale.of(row, group);
                zero = weight.zero.of(row, group);
            }
            const float number = Codes::number(codes[column % Codes::BLOCK]);
            line[column % LANES] = Kind::LEAST ? (number + Codes::MIDDLE) * scale + zero : (number - zero) * scale;
            if ((column + 1) % LANES == 0) store(to + column + 1 - LANES, load(line));
        }
    }
    const int64_t rest = weight.columns % LANES;
    if (rest) store(to + weight.columns - rest, load(line), rest);
}
