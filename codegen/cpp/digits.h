// Floats as integers of 24 bits that share an exponent, in three signed bytes, and products of bytes that are summed exactly.

// Bytes of an integer.
constexpr int FIXED_DIGITS = 3;

// `total` and the products of each lane's four unsigned bytes of `codes`, none above `most`, with the signed ones of `x`.
template <int most>
static inline Ints dot_bytes(Ints codes, Ints x, Ints total) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
    if (most < 128) {
        // Two products stay within 16 bits.
        const __m256i halves = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x));
        return total + reinterpret_cast<Ints>(_mm256_madd_epi16(halves, _mm256_set1_epi16(1)));
    }
    const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(reinterpret_cast<__m256i>(x), 8), 8);
    const __m256i high = _mm256_srai_epi16(reinterpret_cast<__m256i>(x), 8);
    const __m256i even = _mm256_madd_epi16(reinterpret_cast<__m256i>(codes & 0x00ff00ff), low);
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(reinterpret_cast<__m256i>(codes), 8), high);
    return total + reinterpret_cast<Ints>(even) + reinterpret_cast<Ints>(odd);
#elif defined(__SSE2__)
    const __m128i low = _mm_srai_epi16(_mm_slli_epi16(reinterpret_cast<__m128i>(x), 8), 8);
    const __m128i high = _mm_srai_epi16(reinterpret_cast<__m128i>(x), 8);
    const __m128i even = _mm_madd_epi16(reinterpret_cast<__m128i>(codes & 0x00ff00ff), low);
    const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(reinterpret_cast<__m128i>(codes), 8), high);
    return total + reinterpret_cast<Ints>(even) + reinterpret_cast<Ints>(odd);
#else
    for (int i = 0; i < 4; i++) total += (codes >> 8 * i & 255) * (x << (24 - 8 * i) >> 24);
    return total;
#endif
}

static inline Ints nearest_whole(Floats vector) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_cvtps_epi32(vector));
#elif defined(__AVX2__)
    return reinterpret_cast<Ints>(_mm256_cvtps_epi32(vector));
#elif defined(__SSE2__)
    return reinterpret_cast<Ints>(_mm_cvtps_epi32(vector));
#else
    Ints whole;
    for (int lane = 0; lane < LANES; lane++)
        whole[lane] = std::abs(vector[lane]) < 0x1p24f ? static_cast<int32_t>(std::nearbyint(vector[lane])) : 0;
    return whole;
#endif
}

static inline int32_t largest_lane(Ints vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(vector));
#else
    int32_t most = 0;
    UNROLL for (int lane = 0; lane < LANES; lane++) most = std::max(most, vector[lane]);
    return most;
#endif
}

static inline float float_of_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

typedef int32_t FixedSums __attribute__((vector_size(16)));

// The sums of the lanes that are four apart.
static inline FixedSums fixed_fold(Ints vector) {
#if defined(__AVX512F__)
    const __m512i all = reinterpret_cast<__m512i>(vector);
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return reinterpret_cast<FixedSums>(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
#elif defined(__AVX2__)
    const __m256i all = reinterpret_cast<__m256i>(vector);
    return reinterpret_cast<FixedSums>(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    return vector;
#endif
}

// Columns as words that meet the codes of four of them: byte d of each four columns is word d, and a fourth is unused.
static inline Ints digits_of(Ints columns) {
#if defined(__AVX2__)
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(columns), _mm512_broadcast_i32x4(order)));
#else
    return reinterpret_cast<Ints>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(columns), _mm256_broadcastsi128_si256(order)));
#endif
#else
    Ints words{};
    for (int d = 0; d < 4; d++)
        for (int i = 0; i < 4; i++) words[d] |= (columns[i] >> 8 * d & 255) << 8 * i;
    return words;
#endif
}

// The greatest bits of floats without their signs: as floats are ordered, so are these.
static inline Ints greater_bits(Ints most, Floats value) {
    const Ints bits = reinterpret_cast<Ints>(value) & 0x7fffffff;
    return bits > most ? bits : most;
}

// The exponent that numbers share whose greatest has the bits `peak`. It becomes less than 2^23 - 2^16, so that its upper byte is signed.
static inline int32_t shared_exponent(int32_t peak) { return std::max(24, (peak >> 23) + ((peak & 0x7fffff) >= 0x7e0000)); }

// What numbers are multiplied with to be such integers, and the unit; infinity and what is no number make it none.
static inline float power_of(int32_t exponent) { return float_of_bits(276 - exponent << 23); }
static inline float unit_of(int32_t exponent, int32_t peak) { return peak < 0x7f800000 ? float_of_bits(exponent - 22 << 23) : NAN; }

// Integers of 24 bits, each in three signed bytes.
static inline Ints in_bytes(Floats value, Floats power) { return nearest_whole(value * power) + 0x808080 ^ 0x808080; }

// `count` columns of x as such integers; returns the unit.
template <class T>
static inline float integers_of(const T* from, int64_t count, int32_t* to) {
    const int64_t full = count / LANES * LANES;
    Ints most{};
    for (int64_t at = 0; at < full; at += LANES) most = greater_bits(most, load(from + at));
    if (full < count) most = greater_bits(most, load(from + full, count - full));
    const int32_t peak = largest_lane(most), exponent = shared_exponent(peak);
    const Floats power = splat(power_of(exponent));
    const auto store_whole = [&](int64_t at, Ints numbers) { std::memcpy(to + at, &numbers, sizeof numbers); };
    for (int64_t at = 0; at < full; at += LANES) store_whole(at, in_bytes(load(from + at), power));
    if (full < count) store_whole(full, in_bytes(load(from + full, count - full), power));
    return unit_of(exponent, peak);
}
