// Sums of rows of codes, each row times a coefficient: of the keys of a channel by a query, of the values of a token by a weight.
//
// Coefficients that share an exponent are integers of 24 bits (`digits.h`), or of 16 where products are fast, whose bytes are multiplied
// with codes by themselves. Codes are unsigned; sums begin at what a sign takes off. They are exact, and become a float at the end.

// Whether codes are summed so: integers, as many with one scale as take whole vectors, where the processor sums such products (AVX-512
// VNNI); elsewhere products of floats are faster.
template <class Form>
constexpr bool SUMMED = LANES == 16 && Form::SCALED && !Form::FLOAT8 && Form::RUN % LANES == 0 && Form::DIMS % 4 == 0;

// Vectors of codes that are met at once, and how many of `rows` queries meet them: as many sums as there are registers for.
constexpr int MET = 2;
constexpr int most_rows(int rows, int vectors, int digits) {
    int many = rows;
    while (rows % many || many * vectors * digits > 24) many--;
    return many;
}

// The coefficients of up to `most` rows for one query: for each four the words of their bytes, where sums begin, the unit, and what joins
// their sum as a float.
template <int64_t most>
struct Coefficients {
    alignas(64) int32_t words[(most + LANES - 1) / LANES * LANES];
    int32_t begin[4];
    float unit, rest;
};

// Coefficients of `count` rows: the numbers of each query, from lane to lane, by the scales of the rows. `numbers_at(q, row)`,
// `scale_at(row)` and `least_at(row)` give those of as many rows as a vector has lanes.
template <class Form, int QUERIES, int64_t most, class Numbers, class Scale, class Least>
static inline void set_coefficients(int64_t count, Numbers numbers_at, Scale scale_at, Least least_at, Coefficients<most>* to) {
    constexpr int64_t VECTORS = (most + LANES - 1) / LANES;
    Floats shares[QUERIES][VECTORS], rest[QUERIES] = {};
    Ints greatest[QUERIES] = {};
    for (int64_t row = 0; row < count; row += LANES) {
        const Floats scale = scale_at(row);
        Floats least{};
        if (!Form::SIGNED) least = least_at(row);
        UNROLL for (int q = 0; q < QUERIES; q++) {
            const Floats numbers = numbers_at(q, row), share = numbers * scale;
            if (!Form::SIGNED) rest[q] = fma(numbers, least, rest[q]);
            greatest[q] = greater_bits(greatest[q], share);
            shares[q][row / LANES] = share;
        }
    }
    Floats power[QUERIES];
    UNROLL for (int q = 0; q < QUERIES; q++) {
        const int32_t peak = largest_lane(greatest[q]), exponent = shared_exponent(peak) + 8 * (FIXED_DIGITS - Form::DIGITS);
        power[q] = splat(power_of(exponent));
        to[q].unit = unit_of(exponent, peak);
        to[q].rest = Form::SIGNED ? 0.0f : sum(rest[q]);
    }
    Ints total[QUERIES] = {};
    for (int64_t row = 0; row < count; row += LANES)
        UNROLL for (int q = 0; q < QUERIES; q++) {
            const Ints digits = digits_of(in_bytes(shares[q][row / LANES], power[q]));
            std::memcpy(to[q].words + row, &digits, sizeof digits);
            if (Form::LOW) total[q] = dot_bytes<1>(0x01010101 - Ints{}, digits, total[q]);
        }
    UNROLL for (int q = 0; q < QUERIES; q++) {
        const FixedSums begin = Form::LOW ? fixed_fold(total[q]) * Form::LOW : FixedSums{};
        std::memcpy(to[q].begin, &begin, sizeof begin);
    }
}

// The coefficients of a query's numbers that meet the words of a token's codes, plane after plane of each word.
template <class Form>
static inline void set_word_coefficients(const float* numbers, Coefficients<Form::GROUP>& to) {
    float turned[Form::GROUP];
    for (int64_t channel = 0; channel < Form::GROUP; channel++) {
        const int64_t byte = channel / Form::PER, plane = channel % Form::PER;
        turned[4 * (byte / 4 * Form::PER + plane) + byte % 4] = numbers[channel];
    }
    const auto one = [](int64_t) { return splat(1.0f); };
    set_coefficients<Form, 1>(Form::GROUP, [&](int, int64_t at) { return load(turned + at); }, one, one, &to);
}

#if defined(__AVX512F__)
// The bytes of four rows, as many of each as a vector has lanes: a lane holds those of one place.
static inline Ints four_rows(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const auto row = [](const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(a)), row(b), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(c)), row(d), 1);
    const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    const __m512i words = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), all);
    return digits_of(reinterpret_cast<Ints>(words));
}
#endif

// Codes of four bytes in each lane: plane `number` of them, low bits first.
template <class Form>
static inline Ints plane_of(Ints bytes, int number) {
    constexpr int32_t mask = static_cast<int32_t>(0x01010101u * Form::TOP);
    return Form::PER == 1 ? bytes : (bytes >> number * Form::BITS) & mask;
}

// Lanes of a and b in turn.
static inline void in_turn(Floats& a, Floats& b) {
    const Ints lanes = lane_numbers(), place = lanes / 2 + (lanes & 1) * LANES;
    const Floats first = shuffled(a, b, place);
    b = shuffled(a, b, place + LANES / 2);
    a = first;
}

// Lanes of `count` vectors in turn.
template <int count>
static inline void interleave(Floats* vectors) {
    if constexpr (count == 2) in_turn(vectors[0], vectors[1]);
    if constexpr (count == 4) {
        std::swap(vectors[1], vectors[2]);
        in_turn(vectors[0], vectors[1]);
        in_turn(vectors[2], vectors[3]);
        std::swap(vectors[1], vectors[2]);
        in_turn(vectors[0], vectors[1]);
        in_turn(vectors[2], vectors[3]);
    }
}

// The sums of the bytes of integers, joined.
template <int digits>
static inline Floats joined(const Ints* sums, float unit) {
    const auto number = [&](int digit) { return __builtin_convertvector(sums[digit], Floats); };
    Floats all = number(0);
    UNROLL for (int digit = 1; digit < digits; digit++) all = fma(number(digit), splat(static_cast<float>(1 << 8 * digit)), all);
    return all * splat(unit);
}

// Sums of `fours` times four rows by the coefficients of each query: `codes_of(four, step)` gives `WIDE` vectors of the codes of four rows,
// number `step` of `STEPS` in turn; `put` takes the sums of a query, a vector at a time.
template <class Form, int ROWS, int WIDE, int STEPS, int64_t most, class Codes, class Put>
static inline void sum_codes(const Coefficients<most>* by, int64_t fours, Codes codes_of, Put put) {
    Ints found[ROWS][WIDE][Form::DIGITS];
    UNROLL for (int q = 0; q < ROWS; q++)
        UNROLL for (int v = 0; v < WIDE; v++)
            UNROLL for (int d = 0; d < Form::DIGITS; d++) found[q][v][d] = by[q].begin[d] - Ints{};
    for (int64_t four = 0; four < fours; four += STEPS)
        UNROLL for (int step = 0; step < STEPS; step++) {
            Ints codes[WIDE];
            codes_of(four, step, codes);
            UNROLL for (int q = 0; q < ROWS; q++)
                UNROLL for (int d = 0; d < Form::DIGITS; d++) {
                    const Ints word = by[q].words[4 * (four + step) + d] - Ints{};
                    UNROLL for (int v = 0; v < WIDE; v++) found[q][v][d] = dot_bytes<Form::TOP>(codes[v], word, found[q][v][d]);
                }
        }
    UNROLL for (int q = 0; q < ROWS; q++)
        UNROLL for (int v = 0; v < WIDE; v++) put(q, v, joined<Form::DIGITS>(found[q][v], by[q].unit));
}

// Vectors of codes that rows are taken by: all planes of as many bytes as a vector has lanes, or two vectors of bytes that are codes.
template <class Form>
constexpr int TAKEN = Form::PER > 1 || Form::RUN % (2 * LANES) ? Form::PER : 2;
// Bytes of a row that these lie in.
template <class Form>
constexpr int64_t TAKEN_BYTES = TAKEN<Form> / Form::PER * LANES;

// The same for `TAKEN_BYTES` of rows: `row_at` says where those of a row begin, `put` takes `TAKEN` vectors of a query, whose lanes are in
// order.
template <class Form, int QUERIES, int64_t most, class Rows, class Put>
static inline void sum_rows(const Coefficients<most>* by, int64_t fours, Ahead& ahead, Rows row_at, Put put) {
    constexpr int WIDE = std::min<int>(TAKEN<Form>, MET), ROWS = most_rows(QUERIES, WIDE, Form::DIGITS);
    for (int first = 0; first < QUERIES; first += ROWS) {
        Floats sums[ROWS][TAKEN<Form>];
        UNROLL for (int vector = 0; vector < TAKEN<Form>; vector += WIDE) {
            const auto codes_of = [&](int64_t four, int, Ints* codes) {
                const int64_t row = 4 * four;
                UNROLL for (int64_t byte = 0; byte < 4 * TAKEN_BYTES<Form>; byte += 64) ahead.next();
                const auto bytes_at = [&](int64_t at) {
                    return four_rows(row_at(row) + at, row_at(row + 1) + at, row_at(row + 2) + at, row_at(row + 3) + at);
                };
                if constexpr (Form::PER == 1) {
                    UNROLL for (int v = 0; v < WIDE; v++) codes[v] = bytes_at(v * LANES);
                } else {
                    const Ints bytes = bytes_at(0);
                    UNROLL for (int v = 0; v < WIDE; v++) codes[v] = plane_of<Form>(bytes, vector + v);
                }
            };
            sum_codes<Form, ROWS, WIDE, 1>(by + first, fours, codes_of, [&](int q, int v, Floats sum) { sums[q][vector + v] = sum; });
        }
        UNROLL for (int q = 0; q < ROWS; q++) {
            if constexpr (Form::PER > 1) interleave<Form::PER>(sums[q]);
            put(first + q, sums[q]);
        }
    }
}
