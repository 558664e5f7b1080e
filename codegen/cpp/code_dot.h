// Integer products of codes: those of a weight, unsigned, with signed ones of x, both four to a word.
//
// Part `q` of a block of the weight (`planes.h`) holds four columns, one a byte, as four codes of x lie in memory: it meets a word of x
// that is read where it stands.

// Rows of codes as products want them: where each is, and by row and run what sums begin with, zero points, sums for minima and
// scales; copies of `held` bytes a row, and one of ones, where runs do not end with words.
struct CodeRows {
    const int8_t** rows;
    int32_t *sums, *zeros;
    float *totals, *scales;
    int8_t *copies, *ones;
    int64_t held;
};

// Four codes in every lane.
static inline Ints every_lane(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, 4);
    return word - Ints{};
}

// `total` and the products of each lane's halves of 16 bits.
static inline Ints dot_pairs(Ints a, Ints b, Ints total) {
#if defined(__AVX512F__)
    return total + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return total + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
    return total + reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Where products with codes of `bits` bits are summed. AVX2 sums pairs of them in 16 bits: up to 4 bits these hold what four words of
// the weight come to (eight pairs of 4-bit codes with int8: 30720), which then joins the run's sum of 32 bits. All else has that at once.
template <int bits>
struct NearSum {
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr bool HALVES = bits <= 4;
    static inline Ints dot_halves(Ints codes, Ints x, Ints total) {
        const __m256i sums = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x));
        return reinterpret_cast<Ints>(_mm256_add_epi16(reinterpret_cast<__m256i>(total), sums));
    }
#else
    static constexpr bool HALVES = false;
    static inline Ints dot_halves(Ints, Ints, Ints total) { return total; }
#endif
    // What a few products are added to, before they join `part`, the sum of the run.
    static inline Ints open(Ints part) { return HALVES ? Ints{} : part; }
    // An open sum and the products of a part of the weight with the word of x that it meets.
    static inline Ints dot(Ints codes, Ints x, Ints open) {
        return HALVES ? dot_halves(codes, x, open) : dot_bytes<(1 << bits) - 1>(codes, x, open);
    }
    // The sum of the run with an open one.
    static inline Ints close(Ints open, Ints part) { return HALVES ? dot_pairs(open, 0x00010001 - Ints{}, part) : open; }
};

// The sum of codes.
static inline int32_t sum_codes(const int8_t* from, int64_t count) {
#if defined(__AVX512F__)
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();
    for (; count >= 64; count -= 64, from += 64) sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(from));
    const __m512i rest = _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, from);
    return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(sums, ones, rest));
#else
    int32_t total = 0;
#if defined(__AVX2__)
    for (; count >= 16; count -= 16, from += 16) {
        // Moved by 128 they are unsigned, and each eight of them are one sum.
        const __m128i codes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), _mm_set1_epi8(-128));
        const __m128i sums = _mm_sad_epu8(codes, _mm_setzero_si128());
        total += _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
    }
#endif
    for (int64_t place = 0; place < count; place++) total += from[place];
    return total;
#endif
}
