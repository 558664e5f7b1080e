// Vectors of a cache below 16 bits: `Packed` says how they lie, as `quant/vector_format.py` defines it.
//
// Codes of a byte belong to neighbours: to channels of a token, or to tokens of a channel where tokens share scales.

// Vectors of `dims` numbers as codes of `bits`: groups of channels of one token share a scale, or each channel of `tokens` of them.
// Numbers begin at a least one, or codes have a sign; `FLOAT8` codes are numbers of 8 bits with an exponent (e4m3), those under `STATIC` have scales in a table, one for each channel.
// Where integers are summed codes meet `digits` bytes of a coefficient (`code_sums.h`).
enum class Kind { LEAST, SIGNED, FLOAT8, STATIC };

template <int64_t dims, int bits, int64_t group, int64_t tokens, Kind kind, int digits = 3>
struct Packed {
    static constexpr int64_t DIMS = dims, GROUP = group, TOKENS = tokens, PER = 8 / bits;
    static constexpr bool SIGNED = kind != Kind::LEAST, FLOAT8 = kind == Kind::FLOAT8, STATIC = kind == Kind::STATIC;
    static constexpr bool SCALED = true, BY_CHANNEL = tokens > 1;
    static constexpr int DIGITS = digits, BITS = bits, TOP = (1 << bits) - 1, LOW = SIGNED && !FLOAT8 ? -(1 << (bits - 1)) : 0;
    static constexpr int64_t GROUPS = BY_CHANNEL ? dims : dims / group;
    // Bytes of the codes that share a scale, of all codes, and of a token.
    static constexpr int64_t RUN = ((BY_CHANNEL ? tokens : group) + PER - 1) / PER;
    static constexpr int64_t BODY = (tokens * dims + PER - 1) / PER, ALL = BODY + GROUPS * (STATIC ? 0 : SIGNED ? 2 : 4);
    static constexpr int64_t WIDTH = (ALL + tokens - 1) / tokens;
    // A vector of numbers, in whole vectors of the processor.
    static constexpr int64_t PLAIN = (dims + LANES - 1) / LANES * LANES;
    typedef uint8_t Cell;
};

static inline Ints lane_numbers() {
    Ints numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
    return numbers;
}

static inline Floats smallest(Floats a, Floats b) { return choose(a < b, a, b); }

// `count` numbers of 16 bits from any address, the other lanes 0.
static inline Floats halves_at(const uint8_t* from, int64_t count) {
    const fp16* half = nullptr;
    return widen(load_bits<Halves>(from, 2 * count), half);
}

// The scale of numbers whose greatest distance, or magnitude, is `spread`: at least the least normal number of 16 bits.
template <class Form>
static inline Floats scale_for(Floats spread) {
    constexpr float most = Form::FLOAT8 ? 448 : Form::SIGNED ? -1 - Form::LOW : Form::TOP;
    return as_stored<fp16>(largest(spread / splat(most), splat(0x1p-14f)));
}

// The bytes of numbers with 4 bits of exponent and 3 behind the point, up to 448: rounded to the nearest, a tie to the even one.
static inline Ints float8_of(Floats numbers) {
    const Floats most = splat(448.0f), small = smallest(magnitude(numbers), most);
    const Ints bits = reinterpret_cast<Ints>(small), below = small < splat(0x1p-6f);
    const Ints normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - 120 * 8;
    const Ints subnormal = reinterpret_cast<Ints>(small + splat(0x1p14f)) - 0x46800000;
    return (below & subnormal) | (~below & normal) | ((reinterpret_cast<Ints>(numbers) >> 24) & 0x80);
}

// The codes of numbers, 0 being the lowest: rounded to the nearest, a tie to the even one.
template <class Form>
static inline Floats rounded_codes(Floats numbers, Floats least, Floats scale) {
    if constexpr (Form::FLOAT8) return __builtin_convertvector(float8_of(numbers / scale), Floats);
    const Floats magic = splat(0x1.8p23f), low = splat(Form::LOW), high = splat(Form::LOW + Form::TOP);
    const Floats steps = (Form::SIGNED ? numbers : numbers - least) / scale;
    return (smallest(largest(steps, low), high) + magic) - magic - low;
}

static inline void put_halves(uint8_t* to, Floats vector, int64_t count) {
    const fp16* half = nullptr;
    const Halves bits = narrow(vector, half);
    std::memcpy(to, &bits, 2 * count);
}

// `count` codes as bytes, low bits first.
template <class Form>
static inline void put_codes(uint8_t* to, const float* codes, int64_t count, int64_t step) {
    for (int64_t byte = 0; byte < Form::RUN; byte++) {
        int packed = 0;
        for (int64_t plane = 0; plane < Form::PER && byte * Form::PER + plane < count; plane++)
            packed |= static_cast<int>(codes[(byte * Form::PER + plane) * step]) << (plane * Form::BITS);
        to[byte] = static_cast<uint8_t>(packed);
    }
}

// Pack the numbers of one token, whose channels share scales in groups.
template <class Form, class T>
static inline void encode_token(const T* numbers, uint8_t* cell) {
    for (int64_t group = 0; group < Form::GROUPS; group++) {
        const T* from = numbers + group * Form::GROUP;
        Floats least = splat(INFINITY), greatest = splat(-INFINITY);
        for (int64_t dim = 0; dim < Form::GROUP; dim += LANES) {
            const int64_t count = std::min<int64_t>(LANES, Form::GROUP - dim);
            const Floats loaded = load(from + dim, count);
            const Floats vector = choose(lane_numbers() < static_cast<int>(count), loaded, splat(get(from + dim)));
            least = smallest(least, vector);
            greatest = largest(greatest, Form::SIGNED ? magnitude(vector) : vector);
        }
        least = Form::SIGNED ? Floats{} : as_stored<fp16>(splat(-largest(-least)));
        const Floats scale = scale_for<Form>(splat(largest(greatest)) - least);
        float codes[(Form::GROUP + LANES - 1) / LANES * LANES];
        for (int64_t dim = 0; dim < Form::GROUP; dim += LANES) {
            const Floats vector = load(from + dim, std::min<int64_t>(LANES, Form::GROUP - dim));
            store(codes + dim, rounded_codes<Form>(vector, least, scale));
        }
        put_codes<Form>(cell + group * Form::RUN, codes, Form::GROUP, 1);
        put_halves(cell + Form::BODY + 2 * group, scale, 1);
        if (!Form::SIGNED) put_halves(cell + Form::BODY + 2 * (Form::GROUPS + group), least, 1);
    }
}

// Pack the numbers of one token by the scales of a table.
template <class Form, class T>
static inline void encode_static(const T* numbers, const fp16* scales, uint8_t* cell) {
    float codes[Form::PLAIN];
    for (int64_t dim = 0; dim < Form::DIMS; dim += LANES) {
        const int64_t count = std::min<int64_t>(LANES, Form::DIMS - dim);
        store(codes + dim, rounded_codes<Form>(load(numbers + dim, count), Floats{}, load(scales + dim, count)));
    }
    put_codes<Form>(cell, codes, Form::DIMS, 1);
}

// Pack tokens that share a scale for each channel; `numbers` [tokens, PLAIN] become codes on the way.
template <class Form>
static inline void encode_channels(float* numbers, uint8_t* cells) {
    std::memset(cells, 0, Form::TOKENS * Form::WIDTH);
    for (int64_t dim = 0; dim < Form::DIMS; dim += LANES) {
        const int64_t count = std::min<int64_t>(LANES, Form::DIMS - dim);
        Floats least = splat(INFINITY), greatest = splat(-INFINITY);
        for (int64_t token = 0; token < Form::TOKENS; token++) {
            const Floats vector = load(numbers + token * Form::PLAIN + dim);
            least = smallest(least, vector);
            greatest = largest(greatest, Form::SIGNED ? magnitude(vector) : vector);
        }
        least = Form::SIGNED ? Floats{} : as_stored<fp16>(least);
        const Floats scale = scale_for<Form>(greatest - least);
        for (int64_t token = 0; token < Form::TOKENS; token++) {
            float* at = numbers + token * Form::PLAIN + dim;
            store(at, rounded_codes<Form>(load(at), least, scale));
        }
        put_halves(cells + Form::BODY + 2 * dim, scale, count);
        if (!Form::SIGNED) put_halves(cells + Form::BODY + 2 * (Form::DIMS + dim), least, count);
    }
    for (int64_t dim = 0; dim < Form::DIMS; dim++)
        put_codes<Form>(cells + dim * Form::RUN, numbers + dim, Form::TOKENS, Form::PLAIN);
}
