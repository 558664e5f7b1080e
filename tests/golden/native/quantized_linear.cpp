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
    typedef TileWeight<Integers<4>, 32, TileScales<fp16>, ZeroCodes<8>> Kind;  // int4 g32 asym fp16
    const Kind weight{codes.at<int32_t>(), {scale.at<fp16>(), 18}, {zero.at<uint8_t>(), 18}, rows, columns};
    constexpr int64_t held = 592;  // words of a row of x
    constexpr int64_t runs = 18;  // of its columns
    constexpr int64_t most = 4;  // rows of x at once
    alignas(64) int32_t words[held * most];
    int32_t begin[4 * runs * most];
    float unit[runs * most], sum[runs * most];
    const FixedRows room{words, begin, unit, sum, held, runs};
    fixed_many<Kind, float>(team.share((rows + TILE - 1) / TILE), x, weight, static_cast<const float*>(nullptr), out, room);
}
