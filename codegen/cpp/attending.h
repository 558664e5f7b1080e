// Queries that read the same head of keys and values: what each of them sees and has gathered. The sums of a query are the same
// whichever queries are beside it: keys come in stretches, which begin at multiples of their length, and so do the parts of a
// sequence, whose results are put together in order.

// Tokens of a part: what threads share a sequence by.
constexpr int64_t PART = 512;

// What queries have gathered: their greatest score, the sum of weights, and of values by weights.
template <int MANY, int64_t ROOM>
struct Gathered {
    alignas(64) float mixed[MANY][ROOM];
    float peak[MANY], total[MANY];
};

template <class Keys, class Values, int MANY, int TOGETHER>
struct Attention {
    typedef Keys KeyForm;
    typedef Values ValueForm;
    // Queries whose products are computed at once, tokens whose scores are computed before they are weighed.
    static constexpr int Q = MANY, ROWS = TOGETHER;
    static constexpr int64_t STRETCH = 256, ROOM = Values::PLAIN;
    int64_t count, position[Q];
    // Keys from `low` up to `high` are seen in this walk.
    int64_t low[Q], high[Q];
    alignas(64) float query[Q][Keys::PLAIN];
    alignas(64) float scores[Q][STRETCH];
    // Of keys whose tokens have scales of their own: the sum of a query's numbers, or these as coefficients of a token's codes.
    static constexpr bool BY_TOKEN = Keys::SCALED && !Keys::BY_CHANNEL;
    float sums[Q][Keys::GROUPS], shrink[Q];
    Coefficients<Keys::GROUP> by[BY_TOKEN && SUMMED<Keys> ? Keys::GROUPS : 0][Q];
    Gathered<Q, ROOM> found;
};

// Those of one batch and head that are taken at once, counted token after token, heads beside each other.
struct Block {
    int64_t batch, head, first, count;
};

static inline Floats highest(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#else
    return largest(a, b);
#endif
}

static inline float highest(Floats vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(vector);
#else
    return largest(vector);
#endif
}

// Scores are exponents of 2, so that weights take no factor: what makes one of an exponent of e.
constexpr float LOG2E = 0x1.715476p0f;

// 2 to the power of x for x up to 0; 0 below the normal numbers.
static inline Floats weight_of(Floats x) {
    const Floats least = splat(-126.0f);
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), exp2_inside(x));
#else
    return choose(x < least, Floats{}, exp2_inside(highest(least, x)));
#endif
}

static inline float weight_of(float x) { return weight_of(splat(x))[0]; }

// Nothing gathered yet.
template <int Q, int64_t ROOM>
static inline void clear(Gathered<Q, ROOM>& found, int64_t count) {
    for (int64_t q = 0; q < count; q++) {
        found.peak[q] = -INFINITY;
        found.total[q] = 0.0f;
        std::memset(found.mixed[q], 0, sizeof found.mixed[q]);
    }
}

// What one part of a sequence gave joins what those before it did.
template <int Q, int64_t ROOM>
static inline void join(Gathered<Q, ROOM>& whole, const Gathered<Q, ROOM>& part, int64_t count) {
    for (int64_t q = 0; q < count; q++) {
        const float peak = std::max(whole.peak[q], part.peak[q]), base = peak == -INFINITY ? 0.0f : peak;
        const float kept = weight_of(whole.peak[q] - base), added = weight_of(part.peak[q] - base);
        whole.peak[q] = peak;
        whole.total[q] = whole.total[q] * kept + part.total[q] * added;
        for (int64_t dim = 0; dim < ROOM; dim += LANES)
            store(whole.mixed[q] + dim, fma(load(part.mixed[q] + dim), splat(added), load(whole.mixed[q] + dim) * splat(kept)));
    }
}

// A query, by the scale of scores and what makes them exponents of 2, and by those of keys that have a table of them.
template <class A, class T>
static inline void set_query(A& a, int64_t q, const T* from, float scale, const fp16* scales = nullptr) {
    typedef typename A::KeyForm Keys;
    for (int64_t dim = 0; dim < Keys::DIMS; dim += LANES) {
        const int64_t count = std::min<int64_t>(LANES, Keys::DIMS - dim);
        const Floats query = load(from + dim, count) * splat(scale * LOG2E);
        store(a.query[q] + dim, Keys::STATIC ? query * load(scales + dim, count) : query);
    }
    if constexpr (A::BY_TOKEN)
        for (int64_t group = 0; group < Keys::GROUPS; group++) {
            const float* numbers = a.query[q] + group * Keys::GROUP;
            a.sums[q][group] = sum(numbers, Keys::GROUP);
            if constexpr (SUMMED<Keys>) set_word_coefficients<Keys>(numbers, a.by[group][q]);
        }
}

// Queries that fill up the last rows see nothing.
template <class A>
static inline void set_rest(A& a) {
    for (int64_t q = a.count; q < A::Q && q % A::ROWS; q++) {
        std::memset(a.query[q], 0, sizeof a.query[q]);
        std::memset(a.sums[q], 0, sizeof a.sums[q]);
        for (auto& by : a.by) by[q] = {};
        std::memset(a.scores[q], 0, sizeof a.scores[q]);
        std::memset(a.found.mixed[q], 0, sizeof a.found.mixed[q]);
        a.shrink[q] = 0.0f;
    }
}

// The scores that a query sees, limited, -inf for the others; its greatest so far, and how much what was gathered shrinks as that grows.
template <class A>
static inline void limit_scores(A& a, int64_t q, int64_t start, int64_t count, float softcap) {
    float* scores = a.scores[q];
    Floats greatest = splat(-INFINITY);
    const bool all = a.low[q] <= start && start + count <= a.high[q] && count % LANES == 0;
    for (int64_t place = 0; place < count; place += LANES) {
        Floats score = load(scores + place);
        if (softcap != 0.0f) score = splat(softcap * LOG2E) * each(score / splat(softcap * LOG2E), [](float x) { return std::tanh(x); });
        if (!all) {
            const Ints key = lane_numbers() + static_cast<int>(start + place);
            const Ints seen = (key >= static_cast<int>(a.low[q])) & (key < static_cast<int>(a.high[q]));
            score = choose(seen, score, splat(-INFINITY));
        }
        store(scores + place, score);
        greatest = highest(greatest, score);
    }
    const float before = a.found.peak[q], peak = std::max(before, highest(greatest));
    a.shrink[q] = peak == before || before == -INFINITY ? 1.0f : weight_of(before - peak);
    a.found.peak[q] = peak;
}

// Scores become weights, 0 for keys that a query does not see.
template <class A>
static inline void weigh(A& a, int64_t start, int64_t count, float softcap) {
    for (int64_t q = 0; q < a.count; q++) limit_scores(a, q, start, count, softcap);
    for (int64_t q = 0; q < a.count; q++) {
        const Floats base = splat(a.found.peak[q] == -INFINITY ? 0.0f : a.found.peak[q]);
        Floats total{};
        for (int64_t place = 0; place < count; place += LANES) {
            const Floats weight = weight_of(load(a.scores[q] + place) - base);
            store(a.scores[q] + place, weight);
            total += weight;
        }
        a.found.total[q] = a.found.total[q] * a.shrink[q] + sum(total);
    }
}

// From the first key that any query sees to behind the last one; first == last if none sees any.
template <class A>
static inline Range seen_by(const A& a) {
    Range seen{INT64_MAX, 0};
    for (int64_t q = 0; q < a.count; q++) {
        if (a.low[q] >= a.high[q]) continue;
        seen = {std::min(seen.first, a.low[q]), std::max(seen.last, a.high[q])};
    }
    return seen.last ? seen : Range{0, 0};
}

// Parts of a sequence with keys that any query sees.
template <class A>
static inline Range parts_of(const A& a) {
    const Range seen = seen_by(a);
    return {seen.first / PART, (seen.last + PART - 1) / PART};
}

// What a query sees, of one part alone; returns where that ends of all parts.
template <class A>
static inline int64_t only_part(A& a, int64_t part) {
    const int64_t last = seen_by(a).last;
    for (int64_t q = 0; q < a.count; q++) {
        a.low[q] = std::max(a.low[q], part * PART);
        a.high[q] = std::min(a.high[q], (part + 1) * PART);
    }
    return last;
}

// The result of a query, by the scales of values that have a table of them; 0 where it saw nothing.
template <class Values, int Q, int64_t ROOM, class T>
static inline void put_result(const Gathered<Q, ROOM>& found, int64_t q, T* to, const fp16* scales = nullptr) {
    const Floats share = splat(found.total[q] > 0.0f ? 1.0f / found.total[q] : 0.0f);
    for (int64_t dim = 0; dim < Values::DIMS; dim += LANES) {
        const int64_t count = std::min<int64_t>(LANES, Values::DIMS - dim);
        const Floats result = load(found.mixed[q] + dim) * share;
        store(to + dim, Values::STATIC ? result * load(scales + dim, count) : result, count);
    }
}
