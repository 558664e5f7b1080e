// The numbers of 4 bits at one place of each word.
static inline Floats int4_g32_fp16_zero_code(Ints word, int64_t place) {
#if defined(__AVX512F__)
    const Floats table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> static_cast<int>(4 * place)), table);
#else
    return __builtin_convertvector(word << static_cast<int>(28 - 4 * place) >> 28, Floats);
#endif
}

// Zero points as differences from the middle code.
static inline Floats load_zero(const uint8_t* from, float middle) {
    return __builtin_convertvector(__builtin_convertvector(load_bits<Bytes>(from), Ints), Floats) - splat(middle);
}

// A row of numbers as floats, as it lies.
static inline const float* as_floats(const float* from, int64_t, float*, int64_t) {
    return from;
}
// A row of numbers as floats, widened into the room from `place` on.
template <class Real>
static inline const float* as_floats(
    const Real* from,
    int64_t columns,
    float* room,
    int64_t place) {
    room += place;
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) store(room + column, load(from + column));
    if (column < columns) store(room + column, load(from + column, columns - column), columns - column);
    return room;
}

// ROWS rows of x times TILES tiles of int4 codes, groups of 32 columns, fp16 scales.
template <int ROWS, int TILES>
static inline void int4_g32_fp16_zero_product(
    const float* const* x,
    const int32_t* codes,
    const fp16* scale,
    const uint8_t* zero,
    const float* sums,
    int64_t columns,
    Floats (&total)[ROWS][TILES][PARTS]) {
    const int64_t words = (columns + 7) / 8;
    const int64_t groups = (columns + 31) / 32;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t last = std::min<int64_t>(columns, (group + 1) * 32);
        int64_t column = group * 32;
        Floats part[ROWS][TILES][PARTS];
        UNROLL for (int t = 0; t < TILES; t++) {
            UNROLL for (int p = 0; p < PARTS; p++) {
                const Floats offset = load_zero(zero + (t * ((groups + 1) / 2 * 2) + group) * TILE + p * LANES, 8.0f);
                UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = splat(-sums[r * groups + group]) * offset;
            }
        }
        for (; column + 8 <= last; column += 8) {
            Ints word[TILES][PARTS];
            UNROLL for (int t = 0; t < TILES; t++) {
                UNROLL for (int p = 0; p < PARTS; p++) {
                    word[t][p] = load_bits<Ints>(codes + (t * words + column / 8) * TILE + p * LANES);
                }
            }
            UNROLL for (int place = 0; place < 8; place++) {
                Floats weight[TILES][PARTS];
                UNROLL for (int t = 0; t < TILES; t++) {
                    UNROLL for (int p = 0; p < PARTS; p++) {
                        weight[t][p] = int4_g32_fp16_zero_code(word[t][p], place);
                    }
                }
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const Floats value = splat(x[r][column + place]);
                    UNROLL for (int t = 0; t < TILES; t++) {
                        UNROLL for (int p = 0; p < PARTS; p++) {
                            part[r][t][p] = fma(weight[t][p], value, part[r][t][p]);
                        }
                    }
                }
            }
        }
        for (; column < last; column++) {
            UNROLL for (int t = 0; t < TILES; t++) {
                UNROLL for (int p = 0; p < PARTS; p++) {
                    const auto word = load_bits<Ints>(codes + (t * words + column / 8) * TILE + p * LANES);
                    const Floats weight = int4_g32_fp16_zero_code(word, column % 8);
                    UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = fma(weight, splat(x[r][column]), part[r][t][p]);
                }
            }
        }
        UNROLL for (int t = 0; t < TILES; t++) {
            UNROLL for (int p = 0; p < PARTS; p++) {
                const Floats factor = load(scale + (t * groups + group) * TILE + p * LANES);
                UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] = fma(factor, part[r][t][p], total[r][t][p]);
            }
        }
    }
}

// ROWS rows of x times a range of tiles of int4 codes, groups of 32 columns, fp16 scales, stored.
template <int ROWS, int TILES, class Real>
static void int4_g32_fp16_zero_rows(
    const Tensor& x,
    const int32_t* codes,
    const fp16* scale,
    const uint8_t* zero,
    const Real* bias,
    const Tensor& out,
    int64_t row,
    Range tiles,
    int64_t rows,
    int64_t columns,
    float* room) {
    const float* from[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) from[r] = as_floats(x.row<Real>(row + r), columns, room, r * columns);
    const int64_t words = (columns + 7) / 8;
    const int64_t groups = (columns + 31) / 32;
    float sums[ROWS * 1024];
    for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * 32, count = std::min<int64_t>(32, columns - first);
        for (int r = 0; r < ROWS; r++) sums[r * groups + group] = sum(from[r] + first, count);
    }
    int64_t tile = tiles.first;
    for (; tile + TILES <= tiles.last; tile += TILES) {
        Floats total[ROWS][TILES][PARTS] = {};
        int4_g32_fp16_zero_product<ROWS, TILES>(
            from, codes + tile * words * TILE, scale + tile * groups * TILE, zero + tile * ((groups + 1) / 2 * 2) * TILE, sums, columns, total);
        UNROLL for (int t = 0; t < TILES; t++) {
            UNROLL for (int p = 0; p < PARTS; p++) {
                const int64_t first = (tile + t) * TILE + p * LANES;
                const int64_t count = std::min<int64_t>(LANES, rows - first);
                if (count <= 0) continue;
                if (bias) UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] += load(bias + first, count);
                UNROLL for (int r = 0; r < ROWS; r++) store(out.row<Real>(row + r) + first, total[r][t][p], count);
            }
        }
    }
    if constexpr (TILES > 1) {
        int4_g32_fp16_zero_rows<ROWS, TILES / 2>(
            x, codes, scale, zero, bias, out, row, Range{tile, tiles.last}, rows, columns, room);
    }
}

// quantized_linear[m2-63] for cpu: K=576, N=1536.
// codes: int4 g32 asym fp16
// out: fp32
// scale: fp16
// x: fp32
// zero: uint8
static void quantized_linear_m2_63_1f29e41af3(
    const Team& team,
    const Tensor& x,
    const Tensor& codes,
    const Tensor& scale,
    const Tensor& zero,
    const Tensor& out) {
    constexpr int64_t rows = 1536;  // of the weight
    constexpr int64_t columns = 576;  // of the weight and of x
    float* room = nullptr;  // rows are floats
    const Range mine = team.share((rows + TILE - 1) / TILE);
    constexpr int64_t tile_bytes = (columns * 4 + 7) / 8 * TILE;
    constexpr int64_t step = std::max<int64_t>(WIDE, NEAR_BYTES / tile_bytes / WIDE * WIDE);
    for (int64_t first = mine.first; first < mine.last; first += step) {
        const Range near{first, std::min(first + step, mine.last)};
        for (int64_t row = 0, count = x.rows(); row < count;) {
            const int64_t left = count - row;
            if constexpr (MANY >= 8) {
                if (left >= 8) {
                    int4_g32_fp16_zero_rows<8, WIDE>(
                        x, codes.at<int32_t>(), scale.at<fp16>(), zero.at<uint8_t>(), static_cast<float*>(nullptr), out, row, near, rows, columns, room);
                    row += 8;
                    continue;
                }
            }
            if constexpr (MANY >= 4) {
                if (left >= 4) {
                    int4_g32_fp16_zero_rows<4, WIDE>(
                        x, codes.at<int32_t>(), scale.at<fp16>(), zero.at<uint8_t>(), static_cast<float*>(nullptr), out, row, near, rows, columns, room);
                    row += 4;
                    continue;
                }
            }
            if (left >= 2) {
                int4_g32_fp16_zero_rows<2, WIDE>(
                    x, codes.at<int32_t>(), scale.at<fp16>(), zero.at<uint8_t>(), static_cast<float*>(nullptr), out, row, near, rows, columns, room);
                row += 2;
                continue;
            }
            int4_g32_fp16_zero_rows<1, WIDE>(
                x, codes.at<int32_t>(), scale.at<fp16>(), zero.at<uint8_t>(), static_cast<float*>(nullptr), out, row, near, rows, columns, room);
            row += 1;
        }
    }
}
