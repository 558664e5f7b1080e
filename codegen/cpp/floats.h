// Products of rows with weights that are numbers, in tiles: a column, or a pair of columns, of 16 rows lies side by side.
//
// Columns are summed in chunks, in order, and a chunk's sum joins the total: one row and many give the same bits.

// How a weight of `Real` is read: `STEP` columns in a word of a row, and what joins the sums of a vector of rows.
template <class Real>
struct WeightOf {
    static constexpr int64_t STEP = 1;
    typedef Real Word;
    typedef Floats Vector;
    static Vector weight(const Word* from) { return load(from); }
    static Vector value(const Real* from, int64_t) { return splat(get(from)); }
    static Floats add(Vector weight, Vector value, Floats sum) { return fma(weight, value, sum); }
};

// Two columns of bf16 are a word, low first.
template <>
struct WeightOf<bf16> {
    static constexpr int64_t STEP = 2;
    typedef int32_t Word;
    typedef Ints Vector;
    static Vector weight(const Word* from) { return load_bits<Ints>(from); }
    // The last one stands alone where there is no pair; the weight beside it is 0.
    static Vector value(const bf16* from, int64_t count) {
        int32_t pair = 0;
        if (count > 1) std::memcpy(&pair, from, 4);
        else pair = from->bits;
        return pair - Ints{};
    }
    static Floats add(Vector weight, Vector value, Floats sum) {
#if defined(__AVX512BF16__)
        // Products are exact; numbers below the normal ones count as 0.
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(value));
#else
        const Floats odd = fma(high_half(weight), high_half(value), sum);
        return fma(reinterpret_cast<Floats>(weight << 16), reinterpret_cast<Floats>(value << 16), odd);
#endif
    }
    static Floats high_half(Ints pairs) { return reinterpret_cast<Floats>(pairs & -0x10000); }
};

// Columns that are summed before they join the total, as shorter sums round less; columns of a weight that stay near while rows of x
// pass, and rows whose totals are kept together.
constexpr int64_t CHUNK = 128, NEAR_COLUMNS = 1024, BESIDE = 64;

// ROWS rows of x times the columns from `first` to `last` of TILES tiles, each of `words` words a row.
template <class Real, int ROWS, int TILES>
static inline void number_product(
    const Real* const* x, const typename WeightOf<Real>::Word* weight, int64_t words, int64_t first, int64_t last,
    Floats (&part)[ROWS][TILES][PARTS]) {
    typedef WeightOf<Real> Kind;
    const auto step = [&](int64_t column, auto count) {
        typename Kind::Vector vector[TILES][PARTS];
        UNROLL for (int t = 0; t < TILES; t++)
            UNROLL for (int p = 0; p < PARTS; p++)
                vector[t][p] = Kind::weight(weight + (t * words + column / Kind::STEP) * TILE + p * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const auto value = Kind::value(x[r] + column, count);
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int p = 0; p < PARTS; p++) part[r][t][p] = Kind::add(vector[t][p], value, part[r][t][p]);
        }
    };
    int64_t column = first;
    for (; column + Kind::STEP <= last; column += Kind::STEP) step(column, std::integral_constant<int64_t, Kind::STEP>());
    if (column < last) step(column, last - column);
}

// The result of a row in a vector of rows of the weight.
template <class Real>
static inline void put_total(Floats total, const Real* bias, Real* to, int64_t first, int64_t rows) {
    if (first + LANES <= rows) {
        if (bias) total += load(bias + first);
        store(to + first, total);
    } else if (first < rows) {
        if (bias) total += load(bias + first, rows - first);
        store(to + first, total, rows - first);
    }
}

// One row of x times a range of tiles.
template <class Real, int TILES>
static inline void one_row(
    const Real* x, const typename WeightOf<Real>::Word* weight, const Real* bias, Real* to, Range tiles, int64_t rows, int64_t columns) {
    const int64_t words = (columns + WeightOf<Real>::STEP - 1) / WeightOf<Real>::STEP;
    int64_t tile = tiles.first;
    for (; tile + TILES <= tiles.last; tile += TILES) {
        Floats total[TILES][PARTS] = {};
        for (int64_t first = 0; first < columns; first += CHUNK) {
            Floats part[1][TILES][PARTS] = {};
            number_product<Real, 1, TILES>(&x, weight + tile * words * TILE, words, first, std::min(columns, first + CHUNK), part);
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int p = 0; p < PARTS; p++) total[t][p] += part[0][t][p];
        }
        UNROLL for (int t = 0; t < TILES; t++)
            UNROLL for (int p = 0; p < PARTS; p++) put_total(total[t][p], bias, to, (tile + t) * TILE + p * LANES, rows);
    }
    if constexpr (TILES > 1) one_row<Real, TILES / 2>(x, weight, bias, to, Range{tile, tiles.last}, rows, columns);
}

// The columns from `first` to `last` of `left` rows of x from `row` on join the totals.
template <class Real, int ROWS, int TILES>
static inline void add_products(
    const Tensor& x, int64_t row, int64_t left, const typename WeightOf<Real>::Word* weight, int64_t words, int64_t first, int64_t last,
    float* totals) {
    for (; left >= ROWS; left -= ROWS, row += ROWS, totals += ROWS * TILES * TILE) {
        const Real* from[ROWS];
        for (int r = 0; r < ROWS; r++) from[r] = x.row<Real>(row + r);
        for (int64_t next = first; next < last; next += CHUNK) {
            Floats part[ROWS][TILES][PARTS] = {};
            number_product<Real, ROWS, TILES>(from, weight, words, next, std::min(last, next + CHUNK), part);
            UNROLL for (int r = 0; r < ROWS; r++)
                UNROLL for (int t = 0; t < TILES; t++)
                    UNROLL for (int p = 0; p < PARTS; p++) {
                        float* to = totals + (r * TILES + t) * TILE + p * LANES;
                        store(to, load(to) + part[r][t][p]);
                    }
        }
    }
    if constexpr (ROWS > 1) add_products<Real, ROWS / 2, TILES>(x, row, left, weight, words, first, last, totals);
}

// Any number of rows of x times a range of tiles: a chunk of the weight is near while rows pass.
template <class Real, int TILES>
static inline void many_rows(
    const Tensor& x, const typename WeightOf<Real>::Word* weight, const Real* bias, const Tensor& out, Range tiles, int64_t rows,
    int64_t columns) {
    const int64_t words = (columns + WeightOf<Real>::STEP - 1) / WeightOf<Real>::STEP, count = x.rows();
    int64_t tile = tiles.first;
    for (; tile + TILES <= tiles.last; tile += TILES)
        for (int64_t row = 0; row < count; row += BESIDE) {
            alignas(64) float totals[BESIDE * TILES * TILE] = {};
            const int64_t beside = std::min(BESIDE, count - row);
            for (int64_t first = 0; first < columns; first += NEAR_COLUMNS)
                add_products<Real, MANY, TILES>(
                    x, row, beside, weight + tile * words * TILE, words, first, std::min(columns, first + NEAR_COLUMNS), totals);
            for (int64_t r = 0; r < beside; r++)
                for (int64_t place = 0; place < TILES * TILE; place += LANES)
                    put_total(load(totals + r * TILES * TILE + place), bias, out.row<Real>(row + r), tile * TILE + place, rows);
        }
    if constexpr (TILES > 1) many_rows<Real, TILES / 2>(x, weight, bias, out, Range{tile, tiles.last}, rows, columns);
}
