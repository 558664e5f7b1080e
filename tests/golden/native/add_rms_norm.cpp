// Columns by vectors: `step` is told where one begins and how many columns it has, LANES in all but the last.
template <class Step>
static inline void every_vector(int64_t first, int64_t last, Step step) {
    int64_t column = first;
    for (; column + LANES <= last; column += LANES) step(column, std::integral_constant<int64_t, LANES>());
    if (column < last) step(column, last - column);
}

// add_rms_norm for cpu: K=576.
// out: fp32
// out1: fp32
// residual: fp32
// weight: fp32
// x: fp32
// option eps = 1e-05
// option offset = 0.0
static void add_rms_norm_fb0c816017(
    const Team& team,
    const Tensor& x,
    const Tensor& residual,
    const Tensor& weight,
    const Tensor& out,
    const Tensor& out1) {
    constexpr int64_t columns = 576;  // of a row
    const float* gain = weight.at<float>();
    const Range mine = team.share(out.rows());
    for (int64_t row = mine.first; row < mine.last; row++) {
        const float* from = x.row<float>(row);
        const float* other = residual.row<float>(row);
        float* total = out.row<float>(row);
        float* to = out1.row<float>(row);
        Floats squares{};
        every_vector(0, columns, [&](int64_t column, auto count) {
            const Floats value = as_stored<float>(load(from + column, count) + load(other + column, count));
            store(total + column, value, count);
            squares = fma(value, value, squares);
        });
        const Floats factor = splat(1.0f / std::sqrt(sum(squares) / columns + 1e-05f));
        every_vector(0, columns, [&](int64_t column, auto count) {
            const Floats value = load(total + column, count) * factor;
            store(to + column, value * load(gain + column, count), count);
        });
    }
}
