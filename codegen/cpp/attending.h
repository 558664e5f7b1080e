// Queries that read the same head of keys and values: which keys each of them sees, and what it has gathered. The sums of a query are
// the same whichever queries are beside it.
template <class Keys, class Values, int MANY_QUERIES>
struct Attention {
    static constexpr int Q = MANY_QUERIES;
    static constexpr int64_t STRETCH = Keys::STRETCH, ROOM = std::max(Values::SPACE, Values::PLAIN);
    // As it came, as the codes of keys lie, and its sums over groups of channels.
    float plain[Q][Keys::PLAIN], query[Q][Keys::SPACE], sums[Q][Keys::GROUPS];
    // Keys from `low` up to `high` are seen in this walk.
    int64_t low[Q], high[Q];
    float peak[Q], total[Q], mixed[Q][ROOM], scores[Q][STRETCH];
};

// The lanes' pairs added: first those of a, then those of b.
static inline Floats pairs(Floats a, Floats b) {
#if defined(__clang__)
    Floats even, odd;
    for (int lane = 0; lane < LANES; lane++) {
        const Floats& from = lane < LANES / 2 ? a : b;
        even[lane] = from[2 * lane % LANES];
        odd[lane] = from[2 * lane % LANES + 1];
    }
    return even + odd;
#else
    const Ints even = lane_numbers() * 2;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

// The sum of each of so many vectors as a vector has lanes.
static inline Floats sums_of(Floats* vectors) {
    UNROLL for (int count = LANES / 2; count > 0; count /= 2)
        UNROLL for (int place = 0; place < count; place++) vectors[place] = pairs(vectors[2 * place], vectors[2 * place + 1]);
    return vectors[0];
}

// Vectors of `dims` numbers as they are, where `Packed` says how others lie.
template <int64_t dims>
struct Plain {
    static constexpr int64_t DIMS = dims, PLAIN = (dims + LANES - 1) / LANES * LANES, SPACE = PLAIN, GROUPS = 1, STRETCH = 64;
    static constexpr bool BY_CHANNEL = true;
    static int64_t place(int64_t dim) { return dim; }
};

// No query yet; one that is not there sees nothing.
template <class A>
static inline void clear(A& a) {
    std::memset(&a, 0, sizeof a);
    for (int q = 0; q < A::Q; q++) a.peak[q] = -INFINITY;
}

template <class Keys, class A, class T>
static inline void set_query(A& a, int q, const T* from) {
    for (int64_t dim = 0; dim < Keys::DIMS; dim++) {
        a.plain[q][dim] = get(from + dim);
        a.query[q][Keys::place(dim)] = a.plain[q][dim];
    }
    if constexpr (!Keys::BY_CHANNEL)
        for (int64_t group = 0; group < Keys::GROUPS; group++)
            a.sums[q][group] = sum(from + group * Keys::GROUP, Keys::GROUP);
}

// Where tokens lie that follow each other in pages [P, L, R, W], from `start` on.
template <class T>
static inline void find_cells(
    const Tensor& pages, const int32_t* table, int64_t head, int64_t start, int64_t count, const T** cells) {
    const int64_t page_tokens = pages.size[2], step = pages.stride[2];
    int64_t page = start / page_tokens, row = start % page_tokens;
    const T* cell = pages.at<T>(table[page], head, row);
    for (int64_t place = 0; place < count; place++, row++, cell += step) {
        if (row == page_tokens) {
            row = 0;
            cell = pages.at<T>(table[++page], head);
        }
        cells[place] = cell;
    }
}

// Scores become weights, 0 for keys that a query does not see; what was gathered shrinks as the peak grows.
template <class A>
static inline void weigh(A& a, int64_t start, int64_t count, float scale, float softcap) {
    for (int q = 0; q < A::Q; q++) {
        float* scores = a.scores[q];
        Floats highest = splat(-INFINITY), total{};
        for (int64_t place = 0; place < count; place += LANES) {
            Floats score = load(scores + place) * splat(scale);
            if (softcap != 0.0f) score = splat(softcap) * each(score / splat(softcap), [](float x) { return std::tanh(x); });
            const Ints key = lane_numbers() + static_cast<int>(start + place);
            const Ints seen = (key >= static_cast<int>(a.low[q])) & (key < static_cast<int>(a.high[q]));
            score = choose(seen, score, splat(-INFINITY));
            store(scores + place, score);
            highest = largest(highest, score);
        }
        const float next = std::max(a.peak[q], largest(highest));
        const float base = next == -INFINITY ? 0.0f : next, shrink = std::exp(a.peak[q] - base);
        a.peak[q] = next;
        for (int64_t place = 0; place < count; place += LANES) {
            const Floats weight = exp(load(scores + place) - splat(base));
            store(scores + place, weight);
            total += weight;
        }
        a.total[q] = a.total[q] * shrink + sum(total);
        for (int64_t dim = 0; dim < A::ROOM; dim += LANES) store(a.mixed[q] + dim, load(a.mixed[q] + dim) * splat(shrink));
    }
}

// From the first key that any query sees to behind the last one; first == last if none sees any.
template <class A>
static inline Range seen_by(const A& a) {
    Range seen{INT64_MAX, 0};
    for (int q = 0; q < A::Q; q++) {
        if (a.low[q] >= a.high[q]) continue;
        seen = {std::min(seen.first, a.low[q]), std::max(seen.last, a.high[q])};
    }
    return seen.last ? seen : Range{0, 0};
}

// The result of a query; 0 where it saw nothing.
template <class A, class T>
static inline void put_result(const A& a, int q, T* to, int64_t dims) {
    const float share = a.total[q] > 0.0f ? 1.0f / a.total[q] : 0.0f;
    for (int64_t dim = 0; dim < dims; dim++) put(to + dim, a.mixed[q][dim] * share);
}
