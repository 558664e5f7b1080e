// Linear layers over floats as sums of integers, for codes that are integers: a run of columns of x shares the exponent of its largest
// number, so that each is an integer of 24 bits. Half a unit is at most 2^-22.9 of the largest, what a sum of floats loses when it meets
// that number. The three bytes of such an integer are multiplied with codes by themselves; these sums are exact, and joined once a run.

// Columns of a run at most.
constexpr int64_t FIXED_RUN = 64;
// Rows of x and tiles beside each other: as many sums as there are registers for.
constexpr int FIXED_MANY = LANES == 16 ? 4 : 2, FIXED_WIDE = LANES == 16 ? 2 : 1, FIXED_SINGLE = LANES == 16 ? 2 : 1;

// Rows of x: by run and byte the words that meet a weight's parts, where sums begin, the unit, and the sum.
struct FixedRows {
    int32_t* words;
    int32_t* begin;
    float* unit;
    float* sum;
    int64_t held, runs;
};

// `step(group, first, last)` for every run.
template <class Kind, class Step>
static inline void every_run(int64_t columns, Step step) {
    const int64_t group = Kind::GROUP ? Kind::GROUP : columns;
    for (int64_t number = 0, first = 0; first < columns; number++)
        for (const int64_t end = std::min(columns, first + group); first < end; first = std::min(end, first + FIXED_RUN))
            step(number, first, std::min(end, first + FIXED_RUN));
}

// One run of a row of x: the words that meet a weight's blocks, zeros where the run ends inside one; returns how many blocks.
template <class Kind, class T>
static inline int64_t fixed_run(const T* from, int64_t first, int64_t last, int32_t* words, int32_t* begin, float* unit, float* sum) {
    typedef typename Kind::Kind Codes;
    const int64_t before = first % Codes::BLOCK, blocks = (before + last - first + Codes::BLOCK - 1) / Codes::BLOCK;
    alignas(64) int32_t numbers[FIXED_RUN + 2 * Codes::BLOCK + 16];
    if (blocks * Codes::BLOCK != last - first || blocks * Codes::BLOCK % 16) std::memset(numbers, 0, sizeof numbers);
    const float step = integers_of(from + first, last - first, numbers + before);
    Ints total{};
    for (int64_t at = 0; at < blocks * Codes::BLOCK; at += LANES) {
        const Ints digits = digits_of(load_bits<Ints>(numbers + at));
        std::memcpy(words + at, &digits, sizeof digits);
        total = dot_bytes<1>(0x01010101 - Ints{}, digits, total);
    }
    const FixedSums sums = fixed_fold(total), start = sums * (Kind::LEAST ? 0 : -Codes::MIDDLE);
    std::memcpy(begin, &start, sizeof start);
    *unit = step * Codes::UNIT;
    if (Kind::MOVED || Kind::LEAST) {
        const float all = sums[0] + sums[1] * 256 + static_cast<float>(sums[2]) * 65536.0f;
        *sum = Kind::LEAST ? step * all : -all;
    }
    return blocks;
}

// Rows of x from `row` on, prepared for a weight.
template <class Kind, class T>
static void fixed_rows(const Tensor& x, int64_t row, int64_t count, int64_t columns, const FixedRows& to) {
    for (int64_t r = 0; r < count; r++) {
        const T* from = x.row<T>(row + r);
        int32_t* words = to.words + r * to.held;
        int64_t place = r * to.runs;
        every_run<Kind>(columns, [&](int64_t, int64_t first, int64_t last) {
            words += Kind::Kind::BLOCK * fixed_run<Kind>(
                from, first, last, words, to.begin + 4 * place, to.unit + place, to.sum + place);
            place++;
        });
    }
}

// `total` = ROWS rows of x times TILES tiles of a weight.
template <class Kind, int ROWS, int TILES>
static inline void fixed_product(
    const FixedRows& x, const Kind& weight, int64_t tile, int64_t apart, Floats (&total)[ROWS][TILES][PARTS]) {
    typedef typename Kind::Kind Codes;
    // Blocks of a run where they divide it.
    constexpr int64_t group = Kind::GROUP ? Kind::GROUP : FIXED_RUN;
    constexpr int64_t whole = group % Codes::BLOCK ? 0 : std::min(group, FIXED_RUN) / Codes::BLOCK;
    const int64_t span = (weight.columns + Codes::BLOCK - 1) / Codes::BLOCK * Codes::WORDS * TILE;
    const int32_t *codes = weight.codes + tile * span, *words = x.words;
    int64_t run = 0;
    every_run<Kind>(weight.columns, [&](int64_t number, int64_t first, int64_t last) {
        // Two sums beside each other where there are few: the next product need not wait for the last.
        constexpr int CHAINS = ROWS == 1 && TILES * PARTS <= 2 ? 2 : 1;
        Ints sum[ROWS][TILES][PARTS][FIXED_DIGITS], other[TILES][PARTS][FIXED_DIGITS] = {};
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int p = 0; p < PARTS; p++)
                    UNROLL for (int d = 0; d < FIXED_DIGITS; d++) sum[r][t][p][d] = x.begin[4 * (r * x.runs + run) + d] - Ints{};
        const auto add = [&](int64_t block, const int32_t* words, int b) __attribute__((always_inline)) {
            Ints word[TILES][PARTS][Codes::WORDS];
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int p = 0; p < PARTS; p++)
                    UNROLL for (int w = 0; w < Codes::WORDS; w++) {
                        const int32_t* from = codes + t * apart * span + (block * Codes::WORDS + w) * TILE + p * LANES;
                        word[t][p][w] = load_bits<Ints>(from);
                        if (ROWS == 1) __builtin_prefetch(from + WORDS_AHEAD);
                    }
            UNROLL for (int q = 0; q < Codes::QUADS; q++) {
                Ints part[TILES][PARTS];
                UNROLL for (int t = 0; t < TILES; t++)
                    UNROLL for (int p = 0; p < PARTS; p++) part[t][p] = Codes::part(word[t][p], q);
                UNROLL for (int r = 0; r < ROWS; r++)
                    UNROLL for (int d = 0; d < FIXED_DIGITS; d++) {
                        const Ints value = words[r * x.held + 4 * q + d] - Ints{};
                        UNROLL for (int t = 0; t < TILES; t++)
                            UNROLL for (int p = 0; p < PARTS; p++) {
                                Ints& to = (b * Codes::QUADS + q) % CHAINS ? other[t][p][d] : sum[r][t][p][d];
                                to = dot_bytes<Codes::MOST>(part[t][p], value, to);
                            }
                    }
            }
        };
        int64_t block = first / Codes::BLOCK;
        if (whole && last - first == whole * Codes::BLOCK) {
            UNROLL for (int b = 0; b < whole; b++) add(block + b, words + b * Codes::BLOCK, b);
            words += whole * Codes::BLOCK;
        } else {
            for (; block * Codes::BLOCK < last; block++, words += Codes::BLOCK) add(block, words, 0);
        }
        if (CHAINS > 1)
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int p = 0; p < PARTS; p++)
                    UNROLL for (int d = 0; d < FIXED_DIGITS; d++) sum[0][t][p][d] += other[t][p][d];
        UNROLL for (int t = 0; t < TILES; t++)
            UNROLL for (int p = 0; p < PARTS; p++) {
                const Floats scale = weight.scale.at(tile + t * apart, number, p), zero = weight.zero.at(tile + t * apart, number, p);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const Ints low = sum[r][t][p][0] + (sum[r][t][p][1] << 8);
                    const Floats high = __builtin_convertvector(sum[r][t][p][2], Floats);
                    Floats all = fma(high, splat(65536.0f), __builtin_convertvector(low, Floats));
                    if (Kind::MOVED) all = fma(zero, splat(x.sum[r * x.runs + run]), all);
                    total[r][t][p] = fma(all, scale * splat(x.unit[r * x.runs + run]), total[r][t][p]);
                    if (Kind::LEAST) total[r][t][p] = fma(zero, splat(x.sum[r * x.runs + run]), total[r][t][p]);
                }
            }
        run++;
    });
}

// ROWS rows of x times a range of tiles, stored.
template <int ROWS, int TILES, class Kind, class T>
static __attribute__((noinline)) void fixed_tiles(const FixedRows& x, const Kind& weight, const T* bias, const Tensor& out, int64_t row, Range tiles) {
    const int64_t apart = (tiles.last - tiles.first) / TILES;
    for (int64_t tile = tiles.first; tile < tiles.first + apart; tile++) {
        Floats total[ROWS][TILES][PARTS] = {};
        fixed_product<Kind, ROWS, TILES>(x, weight, tile, apart, total);
        put_tiles<ROWS, TILES>(total, weight, bias, out, row, tile, apart);
    }
    if constexpr (TILES > 1) fixed_tiles<ROWS, 1>(x, weight, bias, out, row, {tiles.first + TILES * apart, tiles.last});
}

// One row of x.
template <class Kind, class T>
static void fixed_single(const Range& mine, const Tensor& x, const Kind& weight, const T* bias, const Tensor& out, const FixedRows& room) {
    if (mine.first == mine.last) return;
    fixed_rows<Kind, T>(x, 0, 1, weight.columns, room);
    fixed_tiles<1, FIXED_SINGLE>(room, weight, bias, out, 0, mine);
}

// Any number of rows, in blocks over tiles that stay near.
template <class Kind, class T>
static void fixed_many(const Range& mine, const Tensor& x, const Kind& weight, const T* bias, const Tensor& out, const FixedRows& room) {
    const int64_t tile_bytes = (weight.columns * Kind::Kind::BITS + 7) / 8 * TILE, rows = x.rows();
    const int64_t step = std::max<int64_t>(FIXED_WIDE, 2 * NEAR_BYTES / tile_bytes / FIXED_WIDE * FIXED_WIDE);
    for (int64_t first = mine.first; first < mine.last; first += step) {
        const Range near{first, std::min(first + step, mine.last)};
        for (int64_t row = 0, count; row < rows; row += count) {
            count = std::min<int64_t>(FIXED_MANY, rows - row);
            if (count == 3) count = 2;
            fixed_rows<Kind, T>(x, row, count, weight.columns, room);
            if (count == 1) fixed_tiles<1, FIXED_SINGLE>(room, weight, bias, out, row, near);
            else if (count == 2) fixed_tiles<2, FIXED_WIDE>(room, weight, bias, out, row, near);
            else fixed_tiles<FIXED_MANY, FIXED_WIDE>(room, weight, bias, out, row, near);
        }
    }
}
