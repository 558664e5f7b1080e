// Attention over pages of packed vectors.
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
        // As many sums at once as there are registers for: each waits for its own last product.
        constexpr int64_t parts = LANES == 16 && A::Q * Values::PER <= 8 && Values::RUN > LANES ? 2 : 1;
        for (int64_t byte = 0; byte < Values::RUN; byte += parts * LANES) {
            Floats sums[parts][A::Q][Values::PER] = {};
            for (int64_t place = 0; place < count; place++) {
                const uint8_t* from = cells[place] + group * Values::RUN + byte;
                UNROLL for (int64_t part = 0; part < parts; part++) {
                    const int64_t here = Values::RUN - byte - part * LANES;
                    const Ints bytes = bytes_at(from + part * LANES, std::max<int64_t>(here, 0));
                    UNROLL for (int plane = 0; plane < Values::PER; plane++) {
                        const Floats codes = codes_in<Values>(bytes, plane);
                        UNROLL for (int q = 0; q < A::Q; q++)
                            sums[part][q][plane] = fma(splat(shares[q][place]), codes, sums[part][q][plane]);
                    }
                }
            }
            for (int q = 0; q < A::Q; q++) {
                const Floats offset = splat(sum(rest[q]));
                for (int64_t part = 0; part < parts && byte + part * LANES < Values::RUN; part++)
                    for (int plane = 0; plane < Values::PER; plane++) {
                        float* to = a.mixed[q] + (group * Values::PER + plane) * Values::PLANE + byte + part * LANES;
                        store(to, load(to) + (sums[part][q][plane] + offset));
                    }
            }
        }
    }
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
