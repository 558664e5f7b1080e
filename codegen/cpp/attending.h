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

// No query yet; one that is not there sees nothing.
template <class A>
static inline void clear(A& a) {
    std::memset(&a, 0, sizeof a);
    for (int q = 0; q < A::Q; q++) a.peak[q] = -INFINITY;
}

template <class Keys, class A>
static inline void set_query(A& a, int q, const float* from) {
    for (int64_t dim = 0; dim < Keys::DIMS; dim++) {
        a.plain[q][dim] = from[dim];
        a.query[q][Keys::place(dim)] = from[dim];
    }
    if (Keys::BY_CHANNEL) return;
    for (int64_t group = 0; group < Keys::GROUPS; group++) a.sums[q][group] = sum(from + group * Keys::GROUP, Keys::GROUP);
}

// Where tokens lie that follow each other in pages [P, L, R, W], from `start` on.
static inline void find_cells(
    const Tensor& pages, const int32_t* table, int64_t head, int64_t start, int64_t count, const uint8_t** cells) {
    const int64_t page_tokens = pages.size[2], step = pages.stride[2];
    int64_t page = start / page_tokens, row = start % page_tokens;
    const uint8_t* cell = pages.at<uint8_t>(table[page], head, row);
    for (int64_t place = 0; place < count; place++, row++, cell += step) {
        if (row == page_tokens) {
            row = 0;
            cell = pages.at<uint8_t>(table[++page], head);
        }
        cells[place] = cell;
    }
}

// The numbers of 16 bits at `offset` of several cells.
static inline Floats gather_halves(const uint8_t* const* cells, int64_t count, int64_t offset) {
    uint8_t bits[2 * LANES] = {};
    for (int64_t place = 0; place < count; place++) std::memcpy(bits + 2 * place, cells[place] + offset, 2);
    return halves_at(bits, LANES);
}

// Scores of tokens that each have scales of their own.
template <class Keys, class A>
static inline void token_scores(A& a, const uint8_t* const* cells, int64_t count) {
    for (int64_t place = 0; place < count; place += LANES) {
        const int64_t here = std::min<int64_t>(LANES, count - place);
        Floats scores[A::Q] = {};
        for (int64_t group = 0; group < Keys::GROUPS; group++) {
            Floats products[A::Q][LANES];
            for (int64_t key = 0; key < LANES; key++) {
                const uint8_t* from = cells[place + std::min(key, here - 1)] + group * Keys::RUN;
                Floats product[A::Q] = {};
                UNROLL for (int64_t byte = 0; byte < Keys::RUN; byte += LANES) {
                    const Ints bytes = bytes_at(from + byte, Keys::RUN - byte);
                    UNROLL for (int plane = 0; plane < Keys::PER; plane++) {
                        const Floats codes = codes_in<Keys>(bytes, plane);
                        const int64_t at = (group * Keys::PER + plane) * Keys::PLANE + byte;
                        UNROLL for (int q = 0; q < A::Q; q++) product[q] = fma(load(a.query[q] + at), codes, product[q]);
                    }
                }
                UNROLL for (int q = 0; q < A::Q; q++) products[q][key] = product[q];
            }
            const Floats scale = gather_halves(cells + place, here, Keys::BODY + 2 * group);
            Floats least{};
            if (!Keys::SIGNED) least = gather_halves(cells + place, here, Keys::BODY + 2 * (Keys::GROUPS + group));
            for (int q = 0; q < A::Q; q++) {
                const Floats dot = sums_of(products[q]), sum = splat(a.sums[q][group]);
                const Floats whole = Keys::SIGNED ? scale * fma(sum, splat(Keys::LOW), dot) : fma(scale, dot, least * sum);
                scores[q] += whole;
            }
        }
        for (int q = 0; q < A::Q; q++) store(a.scores[q] + place, scores[q]);
    }
}

// Scores of tokens that share the scale of each channel: scales join the query.
template <class Keys, class A>
static inline void channel_scores(A& a, const uint8_t* const* cells, int64_t count) {
    for (int64_t place = 0; place < count; place += Keys::TOKENS) {
        const uint8_t* together = cells[place];
        float shares[A::Q][Keys::PLAIN];
        Floats rest[A::Q] = {};
        for (int64_t dim = 0; dim < Keys::DIMS; dim += LANES) {
            const int64_t here = std::min<int64_t>(LANES, Keys::DIMS - dim);
            const Floats scale = halves_at(together + Keys::BODY + 2 * dim, here);
            Floats least = scale * splat(Keys::LOW);
            if (!Keys::SIGNED) least = halves_at(together + Keys::BODY + 2 * (Keys::DIMS + dim), here);
            for (int q = 0; q < A::Q; q++) {
                const Floats query = load(a.query[q] + dim);
                store(shares[q] + dim, query * scale);
                rest[q] = fma(query, least, rest[q]);
            }
        }
        for (int64_t byte = 0; byte < Keys::RUN; byte += LANES) {
            const int64_t here = std::min<int64_t>(LANES, Keys::RUN - byte);
            Floats sums[A::Q][Keys::PER] = {};
            for (int64_t dim = 0; dim < Keys::DIMS; dim++) {
                const Ints bytes = bytes_at(together + dim * Keys::RUN + byte, here);
                UNROLL for (int plane = 0; plane < Keys::PER; plane++) {
                    const Floats codes = codes_in<Keys>(bytes, plane);
                    UNROLL for (int q = 0; q < A::Q; q++)
                        sums[q][plane] = fma(splat(shares[q][dim]), codes, sums[q][plane]);
                }
            }
            for (int q = 0; q < A::Q; q++) {
                const Floats offset = splat(sum(rest[q]));
                for (int plane = 0; plane < Keys::PER; plane++) {
                    float lanes[LANES];
                    store(lanes, sums[q][plane] + offset);
                    for (int64_t lane = 0; lane < here; lane++)
                        a.scores[q][place + (byte + lane) * Keys::PER + plane] = lanes[lane];
                }
            }
        }
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

// Values of tokens, by their weights, join what was gathered, in the order of planes.
template <class Values, class A>
static inline void token_values(A& a, const uint8_t* const* cells, int64_t count) {
    for (int64_t group = 0; group < Values::GROUPS; group++) {
        float shares[A::Q][A::STRETCH];
        Floats rest[A::Q] = {};
        for (int64_t place = 0; place < count; place += LANES) {
            const int64_t here = std::min<int64_t>(LANES, count - place);
            const Floats scale = gather_halves(cells + place, here, Values::BODY + 2 * group);
            Floats least = scale * splat(Values::LOW);
            if (!Values::SIGNED) least = gather_halves(cells + place, here, Values::BODY + 2 * (Values::GROUPS + group));
            for (int q = 0; q < A::Q; q++) {
                const Floats weight = load(a.scores[q] + place);
                store(shares[q] + place, weight * scale);
                rest[q] = fma(weight, least, rest[q]);
            }
        }
        for (int64_t byte = 0; byte < Values::RUN; byte += LANES) {
            const int64_t here = std::min<int64_t>(LANES, Values::RUN - byte);
            Floats sums[A::Q][Values::PER] = {};
            for (int64_t place = 0; place < count; place++) {
                const Ints bytes = bytes_at(cells[place] + group * Values::RUN + byte, here);
                UNROLL for (int plane = 0; plane < Values::PER; plane++) {
                    const Floats codes = codes_in<Values>(bytes, plane);
                    UNROLL for (int q = 0; q < A::Q; q++)
                        sums[q][plane] = fma(splat(shares[q][place]), codes, sums[q][plane]);
                }
            }
            for (int q = 0; q < A::Q; q++) {
                const Floats offset = splat(sum(rest[q]));
                for (int plane = 0; plane < Values::PER; plane++) {
                    float* to = a.mixed[q] + (group * Values::PER + plane) * Values::PLANE + byte;
                    store(to, load(to) + (sums[q][plane] + offset));
                }
            }
        }
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

// Walk the pages of a sequence; stretches begin at multiples of their length, so that a query's sums know no other's range.
template <class Keys, class Values, class A>
static inline void attend_pages(
    A& a, const Tensor& keys, const Tensor& values, const int32_t* table, int64_t head, float scale, float softcap) {
    const Range seen = seen_by(a);
    for (int64_t start = seen.first / A::STRETCH * A::STRETCH; start < seen.last; start += A::STRETCH) {
        const int64_t count = std::min(A::STRETCH, seen.last - start);
        const uint8_t* cells[A::STRETCH];
        find_cells(keys, table, head, start, count, cells);
        if constexpr (Keys::BY_CHANNEL) channel_scores<Keys>(a, cells, count);
        else token_scores<Keys>(a, cells, count);
        weigh(a, start, count, scale, softcap);
        find_cells(values, table, head, start, count, cells);
        token_values<Values>(a, cells, count);
    }
}

// What was gathered from planes, in the order of channels.
template <class Values, class A>
static inline void unfold(A& a) {
    for (int q = 0; q < A::Q; q++) {
        float plain[A::ROOM] = {};
        for (int64_t dim = 0; dim < Values::DIMS; dim++) plain[dim] = a.mixed[q][Values::place(dim)];
        std::memcpy(a.mixed[q], plain, sizeof plain);
    }
}

// The result of a query; 0 where it saw nothing.
template <class A>
static inline void put_result(const A& a, int q, float* to, int64_t dims) {
    const float share = a.total[q] > 0.0f ? 1.0f / a.total[q] : 0.0f;
    for (int64_t dim = 0; dim < dims; dim++) to[dim] = a.mixed[q][dim] * share;
}
