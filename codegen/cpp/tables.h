// Linear layers over weights whose codes stand for floats: a code is looked up, and multiplied as a float.

// Quantiles of a normal distribution (QLoRA, arXiv:2305.14314).
struct Nf4 : Planes<4> {
    static constexpr int MIDDLE = 0;
    alignas(64) static constexpr float TABLE[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
    };
    // The numbers of one column of each word.
    static inline Floats numbers(Ints words, int place) {
        const Ints codes = words >> (place % 4 * 8 + place / 4 * 4);
#if defined(__AVX512F__)
        return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), _mm512_load_ps(TABLE));
#elif defined(__AVX2__)
        const __m256i index = reinterpret_cast<__m256i>(codes);
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(TABLE), index), high = _mm256_permutevar8x32_ps(_mm256_load_ps(TABLE + 8), index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#else
        Floats found;
        for (int lane = 0; lane < LANES; lane++) found[lane] = TABLE[codes[lane] & 15];
        return found;
#endif
    }
    static inline float number(int code) { return TABLE[code]; }
};

// e4m3 without infinities (arXiv:2209.05433).
struct Fp8 : Planes<8> {
    static constexpr int MIDDLE = 0;
    static inline Floats numbers(Ints words, int place) { return widen_e4m3(words >> 8 * place & 255); }
    static inline float number(int code) { return widen_e4m3(code - Ints{})[0]; }
};

// Rows of x as floats, in `room` where they are stored as halves.
static inline const float* as_floats_of(const float* from, int64_t, float*) { return from; }

template <class T>
static inline const float* as_floats_of(const T* from, int64_t columns, float* room) {
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) store(room + column, load(from + column));
    if (column < columns) store(room + column, load(from + column, columns - column), columns - column);
    return room;
}

// `total` = ROWS rows of x times TILES tiles of a weight: the sums of each group in the order of the columns, then times its scale.
template <class Kind, int ROWS, int TILES>
static inline void table_product(const float* const* x, const Kind& weight, int64_t tile, Floats (&total)[ROWS][TILES][PARTS]) {
    typedef typename Kind::Kind Codes;
    constexpr int64_t per = 32 / Codes::BITS;
    const int64_t words = (weight.columns + per - 1) / per, size = Kind::GROUP ? Kind::GROUP : weight.columns;
    for (int64_t group = 0, column = 0; column < weight.columns; group++) {
        const int64_t last = std::min(weight.columns, column + size);
        Floats part[ROWS][TILES][PARTS] = {};
        const auto add = [&](int64_t word, int place) __attribute__((always_inline)) {
            Floats number[TILES][PARTS];
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int p = 0; p < PARTS; p++) {
                    const int64_t at = ((tile + t) * words + word) * TILE + p * LANES;
                    number[t][p] = Codes::numbers(load_bits<Ints>(weight.codes + at), place);
                }
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Floats value = splat(x[r][word * per + place]);
                UNROLL for (int t = 0; t < TILES; t++)
                    UNROLL for (int p = 0; p < PARTS; p++) part[r][t][p] = fma(number[t][p], value, part[r][t][p]);
            }
        };
        for (; column < last && column % per; column++) add(column / per, column % per);
        for (; column + per <= last; column += per) UNROLL for (int place = 0; place < per; place++) add(column / per, place);
        for (; column < last; column++) add(column / per, column % per);
        UNROLL for (int t = 0; t < TILES; t++)
            UNROLL for (int p = 0; p < PARTS; p++) {
                const Floats scale = weight.scale.at(tile + t, group, p);
                UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] = fma(scale, part[r][t][p], total[r][t][p]);
            }
    }
}

// ROWS rows of x from `row` on times a range of tiles, stored.
template <int ROWS, int TILES, class Kind, class T>
static void table_tiles(const Tensor& x, const Kind& weight, const T* bias, const Tensor& out, int64_t row, Range tiles, float* room) {
    const float* from[ROWS];
    for (int r = 0; r < ROWS; r++) from[r] = as_floats_of(x.row<T>(row + r), weight.columns, room + r * weight.columns);
    int64_t tile = tiles.first;
    for (; tile + TILES <= tiles.last; tile += TILES) {
        Floats total[ROWS][TILES][PARTS] = {};
        table_product<Kind, ROWS, TILES>(from, weight, tile, total);
        put_tiles<ROWS, TILES>(total, weight, bias, out, row, tile, 1);
    }
    if constexpr (TILES > 1) table_tiles<ROWS, TILES / 2>(x, weight, bias, out, row, {tile, tiles.last}, room);
}

// One row of x.
template <class Kind, class T>
static void table_single(const Range& mine, const Tensor& x, const Kind& weight, const T* bias, const Tensor& out, float* room) {
    if (mine.first < mine.last) table_tiles<1, SINGLE_WIDE>(x, weight, bias, out, 0, mine, room);
}

// Any number of rows, in blocks over tiles that stay near.
template <class Kind, class T>
static void table_many(const Range& mine, const Tensor& x, const Kind& weight, const T* bias, const Tensor& out, float* room) {
    const int64_t tile_bytes = (weight.columns * Kind::Kind::BITS + 7) / 8 * TILE, rows = x.rows();
    const int64_t step = std::max<int64_t>(WIDE, NEAR_BYTES / tile_bytes / WIDE * WIDE);
    for (int64_t first = mine.first; first < mine.last; first += step) {
        const Range near{first, std::min(first + step, mine.last)};
        int64_t row = 0;
        for (; row + MANY <= rows; row += MANY) table_tiles<MANY, WIDE>(x, weight, bias, out, row, near, room);
        for (; row + 2 <= rows; row += 2) table_tiles<2, WIDE>(x, weight, bias, out, row, near, room);
        if (row < rows) table_tiles<1, SINGLE_WIDE>(x, weight, bias, out, row, near, room);
    }
}
