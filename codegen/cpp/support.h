// What every kernel of an artifact stands on: tensors, vectors of floats.
//
// Vectors are as wide as the instruction set that this file is compiled for has them. Every function here gives the same
// bits whatever the number of threads; products and sums are fused only where `fma` says so.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// Numbers of 16 bits as they are stored.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Memory with up to five axes; strides are in elements.
struct Tensor {
    void* data;
    int64_t rank;
    int64_t size[5];
    int64_t stride[5];

    template <class T>
    T* at(int64_t i = 0, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
        return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
    }

    // How many elements there are.
    int64_t count() const { return rank ? rows() * size[rank - 1] : 1; }

    // Element `index`, counted over all axes.
    template <class T>
    T& element(int64_t index) const {
        int64_t offset = 0;
        for (int64_t axis = rank - 1; axis >= 0; axis--) {
            offset += index % size[axis] * stride[axis];
            index /= size[axis];
        }
        return static_cast<T*>(data)[offset];
    }

    // How many rows there are: all axes but the last.
    int64_t rows() const {
        int64_t count = 1;
        for (int64_t axis = 0; axis < rank - 1; axis++) count *= size[axis];
        return count;
    }

    // Row `index`, counted over all axes but the last.
    template <class T>
    T* row(int64_t index) const {
        int64_t offset = 0;
        for (int64_t axis = rank - 2; axis >= 0; axis--) {
            offset += index % size[axis] * stride[axis];
            index /= size[axis];
        }
        return static_cast<T*>(data) + offset;
    }
};

// Before a short loop over registers: without it the compiler leaves them in memory.
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Rows of a weight that lie side by side in memory, and the vectors that hold them.
constexpr int TILE = 16;
constexpr int PARTS = TILE / LANES;
// Rows of x that a product takes at once, and tiles beside each other: as many sums as there are registers for.
constexpr int MANY = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
constexpr int WIDE = LANES == 16 ? 2 : 1;
constexpr int SINGLE_WIDE = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
// Bytes of a weight that stay in the cache nearby while rows of x pass.
constexpr int64_t NEAR_BYTES = 1 << 18;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline Floats splat(float value) { return value - Floats{}; }

template <class Vector, class T>
static inline Vector load_bits(const T* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// The first `count` elements, the others 0.
template <class Vector, class T>
static inline Vector load_bits(const T* from, int64_t count) {
    Vector vector{};
    std::memcpy(&vector, from, count * sizeof(T));
    return vector;
}

// Bytes of a vector in lanes, unsigned.
static inline Ints lanes_of(const Bytes& bytes) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
    return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(bytes))));
#else
    return __builtin_convertvector(bytes, Ints);
#endif
}

static inline Floats widen(Floats vector, const float*) { return vector; }

static inline Floats widen(Halves bits, const bf16*) {
    return reinterpret_cast<Floats>(__builtin_convertvector(bits, Ints) << 16);
}

static inline Floats widen(Halves bits, const fp16*) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
    // Exponent and mantissa in the place of a float's, times the difference of the biases: exact, subnormal numbers included.
    Ints wide = __builtin_convertvector(bits, Ints);
    Floats value = reinterpret_cast<Floats>((wide & 0x7fff) << 13) * 0x1p112f;
    Ints special = reinterpret_cast<Ints>(value) | (((wide & 0x7c00) == 0x7c00) & 0x7f800000);
    return reinterpret_cast<Floats>(special | ((wide & 0x8000) << 16));
#endif
}

template <class T> struct Stored { typedef Halves Vector; };
template <> struct Stored<float> { typedef Floats Vector; };

template <class T>
static inline Floats load(const T* from) { return widen(load_bits<typename Stored<T>::Vector>(from), from); }

template <class T>
static inline Floats load(const T* from, int64_t count) { return widen(load_bits<typename Stored<T>::Vector>(from, count), from); }

static inline Floats narrow(Floats vector, const float*) { return vector; }

static inline Halves narrow(Floats vector, const bf16*) {
    Ints bits = reinterpret_cast<Ints>(vector);
    Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Ints number = vector == vector;
    return __builtin_convertvector((number & rounded) | (~number & 0x7fc0), Halves);
}

static inline uint16_t round_fp16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Subnormal: the sum with 0.5 has the last place that the number of 16 bits has.
        float absolute, sum;
        std::memcpy(&absolute, &magnitude, 4);
        sum = absolute + 0.5f;
        std::memcpy(&bits, &sum, 4);
        return sign | (bits - 0x3f000000);
    }
    return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

static inline Halves narrow(Floats vector, const fp16*) {
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(_mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return reinterpret_cast<Halves>(_mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
#else
    Halves bits{};
    for (int lane = 0; lane < LANES; lane++) bits[lane] = round_fp16(vector[lane]);
    return bits;
#endif
}

template <class T>
static inline void store(T* to, Floats vector) {
    auto bits = narrow(vector, to);
    std::memcpy(to, &bits, sizeof bits);
}

template <class T>
static inline void store(T* to, Floats vector, int64_t count) {
    auto bits = narrow(vector, to);
    std::memcpy(to, &bits, count * sizeof(T));
}

// What is left of a vector when it is stored as T.
template <class T>
static inline Floats as_stored(Floats vector) {
    const T* kind = nullptr;
    return widen(narrow(vector, kind), kind);
}

// One number.
template <class T>
static inline float get(const T* from) { return load(from, 1)[0]; }

static inline float get(const float* from) { return *from; }

template <class T>
static inline void put(T* to, float value) { store(to, splat(value), 1); }

static inline void put(float* to, float value) { *to = value; }

// a · b + c, rounded once where the instruction set can.
static inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
    Floats sum;
    for (int lane = 0; lane < LANES; lane++) sum[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return sum;
#else
    return a * b + c;
#endif
}

static inline Floats choose(Ints condition, Floats yes, Floats no) {
    return reinterpret_cast<Floats>((condition & reinterpret_cast<Ints>(yes)) | (~condition & reinterpret_cast<Ints>(no)));
}

// The larger lanes, those of b where neither is: as `a > b ? a : b`.
static inline Floats largest(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return choose(a > b, a, b);
#endif
}

// The sum of all lanes, in halves.
static inline float sum(Floats vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(vector);
#else
    float lanes[LANES];
    std::memcpy(lanes, &vector, sizeof lanes);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
#endif
}

static inline float largest(Floats vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(vector);
#elif defined(__AVX2__)
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(vector), _mm256_extractf128_ps(vector, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
    float lanes[LANES];
    std::memcpy(lanes, &vector, sizeof lanes);
    return *std::max_element(lanes, lanes + LANES);
#endif
}

// e to the power of x from -87.3 to 88.7, within 2 units in the last place.
static inline Floats exp_inside(Floats x) {
#if defined(__AVX512F__)
    // 2 to the power of whole steps, which the processor applies, times that of what is left, up to half a step (a minimax polynomial).
    const Floats steps = _mm512_roundscale_ps(x * splat(0x1.715476p0f), 0);
    const Floats rest = fma(x, splat(0x1.4ae0cp-26f), fma(x, splat(0x1.715476p0f), -steps));
    Floats power = fma(rest, splat(0x1.41d334p-13f), splat(0x1.5f456ap-10f));
    power = fma(rest, power, splat(0x1.3b2dbcp-7f));
    power = fma(rest, power, splat(0x1.c6aed4p-5f));
    power = fma(rest, power, splat(0x1.ebfbdap-3f));
    power = fma(rest, power, splat(0x1.62e43p-1f));
    return _mm512_scalef_ps(fma(rest, power, splat(1.0f)), steps);
#else
    // The polynomial of Cephes.
    const Floats magic = splat(0x1.8p23f);
    Floats steps = fma(x, splat(0x1.715476p0f), magic);
    const Ints exponent = reinterpret_cast<Ints>(steps) << 23;
    steps = steps - magic;
    const Floats rest = fma(steps, splat(-0x1.7f7d1cp-20f), fma(steps, splat(-0x1.62e4p-1f), x));
    Floats power = fma(rest, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    power = fma(rest, power, splat(8.3334519073e-3f));
    power = fma(rest, power, splat(4.1665795894e-2f));
    power = fma(rest, power, splat(1.6666665459e-1f));
    power = fma(rest, power, splat(5.0000001201e-1f));
    power = fma(rest * rest, power, rest + splat(1.0f));
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) + exponent);
#endif
}

// 2 to the power of x from -126 to 127, within 2.5 units in the last place: whole steps, times a minimax polynomial of up to half a step.
static inline Floats exp2_inside(Floats x) {
#if defined(__AVX512F__)
    const Floats steps = _mm512_roundscale_ps(x, 0);
#else
    const Floats magic = splat(0x1.8p23f), moved = x + magic, steps = moved - magic;
#endif
    const Floats rest = x - steps;
    Floats power = fma(rest, splat(0x1.5bb994p-10f), splat(0x1.3cea84p-7f));
    power = fma(rest, power, splat(0x1.c6b754p-5f));
    power = fma(rest, power, splat(0x1.ebf9bcp-3f));
    power = fma(rest, power, splat(0x1.62e42ap-1f));
    power = fma(rest, power, splat(1.0f));
#if defined(__AVX512F__)
    return _mm512_scalef_ps(power, steps);
#else
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) + (reinterpret_cast<Ints>(moved) << 23));
#endif
}

// e to the power of x; 0 below the normal numbers.
static inline Floats exp(Floats x) {
    const Floats inside = choose(x > splat(-87.3f), choose(x < splat(88.7f), x, splat(88.7f)), splat(-87.3f));
    const Floats power = choose(x > splat(88.7f), splat(INFINITY), choose(x < splat(-87.3f), Floats{}, exp_inside(inside)));
    return choose(x == x, power, x);
}

static inline Floats magnitude(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff); }

static inline Floats with_sign(Floats size, Floats sign) {
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(size) | (reinterpret_cast<Ints>(sign) & INT32_MIN));
}

// Within 4 units in the last place (the polynomial of Cephes; by e to the power of 2x further out).
static inline Floats tanh(Floats x) {
    const Floats square = x * x, size = magnitude(x);
    Floats near = fma(square, splat(-5.70498872745e-3f), splat(2.06390887954e-2f));
    near = fma(square, near, splat(-5.37397155531e-2f));
    near = fma(square, near, splat(1.33314422036e-1f));
    near = fma(square, near, splat(-3.33332819422e-1f));
    const Floats far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
    return choose(size < splat(0.625f), fma(near * square, x, x), with_sign(far, x));
}

// Within 8 units in the last place (the quotient of polynomials that Eigen has); 1 from 4 on.
static inline Floats erf(Floats x) {
    const Floats square = x * x;
    Floats above = fma(square, splat(-2.72614225801306e-10f), splat(2.77068142495902e-08f));
    above = fma(square, above, splat(-2.10102402082508e-06f));
    above = fma(square, above, splat(-5.69250639462346e-05f));
    above = fma(square, above, splat(-7.34990630326855e-04f));
    above = fma(square, above, splat(-2.95459980854025e-03f));
    above = fma(square, above, splat(-1.60960333262415e-02f));
    Floats below = fma(square, splat(-1.45660718464996e-05f), splat(-2.13374055278905e-04f));
    below = fma(square, below, splat(-1.68282697438203e-03f));
    below = fma(square, below, splat(-7.37332916720468e-03f));
    below = fma(square, below, splat(-1.42647390514189e-02f));
    return choose(magnitude(x) < splat(4.0f), x * above / below, choose(x == x, with_sign(splat(1.0f), x), x));
}

// The sum of `count` numbers.
template <class T>
static inline float sum(const T* from, int64_t count) {
    Floats total{};
    for (; count >= LANES; count -= LANES, from += LANES) total += load(from);
    return sum(total + load(from, count));
}

// Each lane through a function of the standard library.
template <class Function>
static inline Floats each(Floats vector, Function function) {
    for (int lane = 0; lane < LANES; lane++) vector[lane] = function(vector[lane]);
    return vector;
}
