// Codes of a weight in tiles of 16 rows, and what they stand for; `qcompile.ir.layouts.tiles_planes` makes the tiles.
//
// A block is the shortest run of columns that takes whole words of 32 bits, for each of the 16 rows. Codes are cut into planes of 4, 2 and
// 1 bits (8 by itself), low bits in the widest; a plane has its own words. Part `q` of a block is its columns 4q to 4q + 3, one a byte.

// How far ahead of the words that meet one row of x others are asked for: 2048 bytes in each of two streams. Of 512 to 8192
// bytes this gave the most of the bandwidth for 4 bits, exact and fast together, on a Zen 4 (`benchmarks/matmul_cpu.py`).
constexpr int64_t WORDS_AHEAD = 512;

// Codes of `bits` bits as they are stored.
template <int bits>
struct Planes {
    static constexpr int BITS = bits;
    // The widest plane and the narrowest.
    static constexpr int WIDE = bits == 8 ? 8 : bits >= 4 ? 4 : 2, LEAST = bits & -bits;
    static constexpr int BLOCK = 32 / LEAST, WORDS = bits / LEAST, QUADS = BLOCK / 4;
    // Part `q` of a plane of `width` bits whose words begin at `words`, its bits moved up by `offset`.
    template <class Word>
    static inline Word plane(const Word* words, int q, int width, int offset) {
        const int per = 8 / width, shift = width * (q % per) - offset;
        const int32_t mask = 0x01010101 * ((1 << width) - 1 << offset);
        const Word word = words[q / per];
        return (shift < 0 ? word << -shift : word >> shift) & mask;
    }
    // Part `q`, unsigned codes.
    template <class Word>
    static inline Word part(const Word* words, int q) {
        if (bits == 8) return words[q];
        Word codes = plane(words, q, WIDE, 0);
        if (bits == 6 || bits == 7) codes = codes | plane(words + BLOCK / 8, q, 2, 4);
        if (bits % 2) codes = codes | plane(words + WORDS - 1, q, 1, bits - 1);
        return codes;
    }
};

// Integers: a number is a code without the middle one, or without the zero point.
template <int bits>
struct Integers : Planes<bits> {
    static constexpr int MIDDLE = 1 << (bits - 1), MOST = (1 << bits) - 1;
    static constexpr float UNIT = 1.0f;
    static inline Ints part(const Ints* words, int q) { return Planes<bits>::part(words, q); }
    static inline float number(int code) { return code - MIDDLE; }
};

// e2m1: numbers are halves of whole ones from -12 to 12, which stand as 0 to 24 in bytes.
struct Fp4 : Planes<4> {
    static constexpr int MIDDLE = 12, MOST = 24;
    static constexpr float UNIT = 0.5f;
    alignas(16) static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    static inline Ints part(const Ints* words, int q) {
        const Ints codes = Planes<4>::part(words, q);
#if defined(__AVX512F__)
        const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(TABLE)));
        return reinterpret_cast<Ints>(_mm512_shuffle_epi8(table, reinterpret_cast<__m512i>(codes)));
#elif defined(__AVX2__)
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(TABLE)));
        return reinterpret_cast<Ints>(_mm256_shuffle_epi8(table, reinterpret_cast<__m256i>(codes)));
#else
        uint8_t bytes[4 * LANES];
        std::memcpy(bytes, &codes, sizeof bytes);
        for (uint8_t& byte : bytes) byte = TABLE[byte];
        return load_bits<Ints>(bytes);
#endif
    }
    static inline float number(int code) { return UNIT * (TABLE[code] - MIDDLE); }
};
