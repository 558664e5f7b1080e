// Reading what a cache holds: the codes of tokens beside each other, a token in each lane, or those of one after the other.
// Vectors of `dims` numbers as they are, where `Packed` says how others lie.
template <int64_t dims, class T>
struct Numbers {
    static constexpr int64_t DIMS = dims, GROUP = dims, GROUPS = 1, TOKENS = 1, RUN = dims * sizeof(T), BODY = RUN, ALL = RUN;
    static constexpr int64_t PLAIN = (dims + LANES - 1) / LANES * LANES;
    static constexpr int BITS = 8 * sizeof(T), LOW = 0;
    static constexpr bool SIGNED = true, SCALED = false, STATIC = false, FLOAT8 = false, BY_CHANNEL = false;
    typedef T Cell;
};

typedef int64_t Longs __attribute__((vector_size(4 * LANES)));

// Lanes of a and then of b.
template <class Vector>
static inline Vector shuffled(Vector a, Vector b, Ints lanes) {
#if defined(__clang__)
    Vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = lanes[lane] < LANES ? a[lanes[lane]] : b[lanes[lane] - LANES];
    return result;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// Codes of a word of 32 bits.
template <class Form>
constexpr int64_t PER_WORD = 32 / Form::BITS;

// The middle of codes, 0 of those that are numbers. Sums of values by weights, which have no sign, stay small less it.
template <class Form>
constexpr int MIDDLE = Form::FLOAT8 ? 0 : 1 << (Form::BITS - 1);

// The code of `bits` in the low bits of each lane, whatever is above it, less `less`.
template <int bits, int less>
static inline Floats low_codes(Ints words) {
    constexpr int top = (1 << bits) - 1;
#if defined(__AVX512F__)
    // A look-up reads four bits of a lane: what is above them need not be cut off.
    constexpr auto code = [](int lane) { return (lane & top) - less; };
    const Floats table = {code(0), code(1), code(2), code(3), code(4), code(5), code(6), code(7),
                          code(8), code(9), code(10), code(11), code(12), code(13), code(14), code(15)};
    if (bits <= 4) return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(words), table);
#endif
    return __builtin_convertvector((words & top) - less, Floats);
}

// The numbers of 8 bits, 4 of them the exponent, in the low bits of each lane.
static inline Floats float8_numbers(Ints words) {
    const Floats size = reinterpret_cast<Floats>((words & 0x7f) << 20) * splat(0x1p120f);
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(size) | ((words & 0x80) << 24));
}

// Code number `place` of the word in each lane, as a number.
template <class Form>
static inline Floats word_code(Ints words, int place) {
    if constexpr (Form::FLOAT8) return float8_numbers(words >> (8 * place));
    return low_codes<Form::BITS, 0>(words >> (place * Form::BITS));
}

// Bytes that hold as many codes as a vector has lanes.
template <class Form>
constexpr int64_t STEP = LANES * Form::BITS / 8;

// As many codes as a vector has lanes, less `less`, or those of the first `bytes`, from any address: `in_order` puts them in order.
template <class Form, int less>
static inline Floats codes_at(const typename Form::Cell* cell, int64_t offset, int64_t bytes) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(cell) + offset;
    if constexpr (!Form::SCALED)
        return bytes >= STEP<Form> ? load(reinterpret_cast<const typename Form::Cell*>(from))
                                   : load(reinterpret_cast<const typename Form::Cell*>(from), bytes / int64_t(sizeof(typename Form::Cell)));
    else if constexpr (Form::BITS == 8) {
        uint8_t held[LANES] = {};
        if (bytes < LANES) std::memcpy(held, from, bytes);
        const uint8_t* codes = bytes < LANES ? held : from;
#if defined(__AVX512F__)
        const Ints wide = reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
        const Ints wide = reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
        const Ints wide = __builtin_convertvector(load_bits<Bytes>(codes), Ints);
#endif
        return Form::FLOAT8 ? float8_numbers(wide) : __builtin_convertvector(wide - less, Floats);
    } else {
        // The same bytes in all lanes, each of which shifts its own code down.
        typename std::conditional<STEP<Form> == 8, int64_t, int32_t>::type held = 0;
        if (bytes < STEP<Form>) std::memcpy(&held, from, bytes);
        else std::memcpy(&held, from, STEP<Form>);
        if constexpr (STEP<Form> == 8) {
            Longs both = held - Longs{};
            return low_codes<Form::BITS, less>(reinterpret_cast<Ints>(both) >> (lane_numbers() / 2 * Form::BITS));
        } else return low_codes<Form::BITS, less>((held - Ints{}) >> (lane_numbers() * Form::BITS));
    }
}

// What `codes_at` gave: lanes of two words that alternate go to their places.
template <class Form>
static inline Floats in_order(Floats vector) {
    if constexpr (!Form::SCALED || STEP<Form> != 8 || Form::BITS == 8) return vector;
    const Ints lanes = lane_numbers();
    return shuffled(vector, vector, lanes % (LANES / 2) * 2 + lanes / (LANES / 2));
}

// `COUNT` words of as many tokens as a vector has lanes, from an offset in their cells: a vector for each word, a token in each lane.
template <int COUNT>
static inline void transpose(Ints* rows) {
    const Ints lanes = lane_numbers();
    UNROLL for (int step = 1; step < COUNT; step *= 2)
        UNROLL for (int row = 0; row < COUNT; row++) {
            if (row & step) continue;
            const Ints odd = (lanes & step) != 0, a = rows[row], b = rows[row + step];
            rows[row] = shuffled(a, b, (odd & (lanes - step + LANES)) | (~odd & lanes));
            rows[row + step] = shuffled(a, b, (odd & (lanes + LANES)) | (~odd & (lanes + step)));
        }
}

// Rows of `COUNT` words, of which `bytes` are there: those of cells number `row`, `row + COUNT` and so on side by side.
template <int COUNT, int64_t bytes>
static inline Ints side_by_side(const uint8_t* const* cells, int row, int64_t offset) {
    constexpr int64_t there = bytes < 4 * COUNT ? bytes : 4 * COUNT;
    Ints found{};
#if defined(__AVX512F__)
    if constexpr (COUNT == 8 && there == 32) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells[row] + offset));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells[row + 8] + offset));
        return reinterpret_cast<Ints>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
#endif
    UNROLL for (int run = 0; run < LANES / COUNT; run++)
        std::memcpy(reinterpret_cast<char*>(&found) + 4 * COUNT * run, cells[row + COUNT * run] + offset, there);
    return found;
}
