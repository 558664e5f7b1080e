// A stretch of tokens: scores of its keys, and sums of its values by their weights.
// Vectors of tokens that are computed at once: as many sums as there are registers for.
constexpr int WIDEST = LANES == 16 ? 4 : 2;

// What the keys of a stretch hold, a token in each lane: the words of their codes, scales, and what numbers begin at.
template <class Form, int64_t STRETCH>
struct Tile {
    static constexpr int64_t WORDS = (Form::BODY + 3) / 4;
    Ints words[WORDS][STRETCH / LANES];
    float scale[Form::GROUPS][STRETCH], least[Form::GROUPS][STRETCH];
};

// Where tokens lie that follow each other in pages [P, L, R, W], from `start` on; behind the last one of `count` it stands again.
template <class A, class T>
static inline void find_cells(
    const Tensor& pages, const int32_t* table, int64_t head, int64_t start, int64_t count, const T** cells) {
    const int64_t page_tokens = pages.size[2], step = pages.stride[2];
    int64_t page = start / page_tokens, row = start % page_tokens;
    for (int64_t place = 0; place < count; page++, row = 0) {
        const T* cell = pages.at<T>(table[page], head, row);
        const int64_t here = std::min(count - place, page_tokens - row);
        for (int64_t token = 0; token < here; token++) cells[place + token] = cell + token * step;
        place += here;
    }
    for (int64_t place = count; place < A::STRETCH; place++) cells[place] = cells[count - 1];
}

// Numbers of 16 bits at an offset in each cell, as floats. Those of four cells are one number first: what is stored in small pieces is
// slow to load at once.
template <class T>
static inline void read_halves(const T* const* cells, int64_t count, int64_t offset, float* to) {
    const fp16* kind = nullptr;
    for (int64_t place = 0; place < count; place += LANES) {
        typedef uint64_t Fours __attribute__((vector_size(2 * LANES)));
        Fours fours;
        UNROLL for (int four = 0; four < LANES / 4; four++) {
            uint16_t halves[4];
            UNROLL for (int token = 0; token < 4; token++)
                std::memcpy(halves + token, reinterpret_cast<const uint8_t*>(cells[place + 4 * four + token]) + offset, 2);
            fours[four] = halves[0] | uint64_t(halves[1]) << 16 | uint64_t(halves[2]) << 32 | uint64_t(halves[3]) << 48;
        }
        store(to + place, widen(reinterpret_cast<Halves>(fours), kind));
    }
}

// The scales of tokens that have their own, and what their numbers begin at.
template <class Form, int64_t STRETCH>
static inline void read_scales(
    const typename Form::Cell* const* cells, int64_t count, float (*scale)[STRETCH], float (*least)[STRETCH]) {
    if constexpr (Form::STATIC)
        for (int64_t place = 0; place < count; place += LANES) store(scale[0] + place, splat(1.0f));
    else if constexpr (Form::SCALED)
        for (int64_t group = 0; group < Form::GROUPS; group++) {
            read_halves(cells, count, Form::BODY + 2 * group, scale[group]);
            if (!Form::SIGNED) read_halves(cells, count, Form::BODY + 2 * (Form::GROUPS + group), least[group]);
        }
}

// Words from number `FIRST` on.
template <class Form, int64_t STRETCH, int64_t FIRST = 0>
static inline void read_words(const typename Form::Cell* const* cells, int64_t count, Tile<Form, STRETCH>& tile) {
    constexpr int64_t left = (Form::BODY + 3) / 4 - FIRST, bytes = Form::BODY - 4 * FIRST;
    constexpr int many = left > 8 && LANES > 8 ? 16 : left > 4 && LANES > 4 ? 8 : 4;
    const uint8_t* const* from = reinterpret_cast<const uint8_t* const*>(cells);
    for (int64_t place = 0; place < count; place += LANES) {
        Ints rows[many];
        UNROLL for (int row = 0; row < many; row++) rows[row] = side_by_side<many, bytes>(from + place, row, 4 * FIRST);
        transpose<many>(rows);
        UNROLL for (int row = 0; row < many; row++)
            if (row < left) tile.words[FIRST + row][place / LANES] = rows[row];
    }
    if constexpr (left > many) read_words<Form, STRETCH, FIRST + many>(cells, count, tile);
}

// The lanes' pairs added: first those of a, then those of b.
static inline Floats pairs(Floats a, Floats b) {
    const Ints even = lane_numbers() * 2;
    return shuffled(a, b, even) + shuffled(a, b, even + 1);
}

// The sum of each of so many vectors as a vector has lanes.
static inline Floats sums_of(Floats* vectors) {
    UNROLL for (int count = LANES / 2; count > 0; count /= 2)
        UNROLL for (int place = 0; place < count; place++) vectors[place] = pairs(vectors[2 * place], vectors[2 * place + 1]);
    return vectors[0];
}

// Scores of keys that are numbers, for queries from `row` on: a lane sums every so many channels, and lanes are added in pairs.
template <class Keys, class A>
static inline void number_scores(A& a, const typename Keys::Cell* const* cells, int64_t place, int64_t row) {
    Floats products[A::ROWS][LANES];
    for (int64_t key = 0; key < LANES; key++) {
        Floats product[A::ROWS] = {};
        UNROLL for (int64_t dim = 0; dim < Keys::DIMS; dim += LANES) {
            const Floats numbers = load(cells[place + key] + dim, std::min<int64_t>(LANES, Keys::DIMS - dim));
            UNROLL for (int q = 0; q < A::ROWS; q++) product[q] = fma(load(a.query[row + q] + dim), numbers, product[q]);
        }
        UNROLL for (int q = 0; q < A::ROWS; q++) products[q][key] = product[q];
    }
    UNROLL for (int q = 0; q < A::ROWS; q++) store(a.scores[row + q] + place, sums_of(products[q]));
}

// Scores of tokens that each have scales of their own, for queries from `row` on: products are summed in the order of channels.
template <class A, class Keys>
static inline void token_scores(A& a, const Tile<Keys, A::STRETCH>& tile, int64_t row, int64_t vector) {
    constexpr int64_t per = PER_WORD<Keys>, together = Keys::GROUP % per ? 1 : per;
    Floats scores[A::ROWS][WIDEST] = {};
    for (int64_t group = 0; group < Keys::GROUPS; group++) {
        Floats sums[A::ROWS][WIDEST] = {};
        for (int64_t dim = group * Keys::GROUP; dim < (group + 1) * Keys::GROUP; dim += together)
            UNROLL for (int64_t next = 0; next < together; next++) {
                Floats codes[WIDEST];
                UNROLL for (int v = 0; v < WIDEST; v++)
                    codes[v] = word_code<Keys>(tile.words[dim / per][vector + v], together > 1 ? next : dim % per);
                UNROLL for (int q = 0; q < A::ROWS; q++) {
                    const Floats query = splat(a.query[row + q][dim + next]);
                    UNROLL for (int v = 0; v < WIDEST; v++) sums[q][v] = fma(query, codes[v], sums[q][v]);
                }
            }
        UNROLL for (int q = 0; q < A::ROWS; q++)
            UNROLL for (int v = 0; v < WIDEST; v++) {
                const Floats total = splat(a.sums[row + q][group]), scale = load(tile.scale[group] + (vector + v) * LANES);
                if (Keys::SIGNED) scores[q][v] += scale * fma(total, splat(Keys::LOW), sums[q][v]);
                else scores[q][v] += fma(scale, sums[q][v], load(tile.least[group] + (vector + v) * LANES) * total);
            }
    }
    UNROLL for (int q = 0; q < A::ROWS; q++)
        UNROLL for (int v = 0; v < WIDEST; v++) store(a.scores[row + q] + (vector + v) * LANES, scores[q][v]);
}

// Scores of tokens that share the scale of each channel, for queries from `row` on: scales join the query.
template <class Keys, class A>
static inline void channel_scores(A& a, const uint8_t* const* cells, int64_t count, int64_t row) {
    constexpr int64_t groups = A::STRETCH / Keys::TOKENS, bytes = Keys::TOKENS * Keys::BITS / 8;
    float shares[groups][A::ROWS][Keys::PLAIN], rest[groups][A::ROWS];
    const uint8_t* from[groups];
    for (int64_t group = 0; group < groups; group++) {
        from[group] = cells[group * Keys::TOKENS < count ? group * Keys::TOKENS : 0];
        Floats sums[A::ROWS] = {};
        for (int64_t dim = 0; dim < Keys::DIMS; dim += LANES) {
            const int64_t here = std::min<int64_t>(LANES, Keys::DIMS - dim);
            const Floats scale = halves_at(from[group] + Keys::BODY + 2 * dim, here);
            Floats least = scale * splat(Keys::LOW);
            if (!Keys::SIGNED) least = halves_at(from[group] + Keys::BODY + 2 * (Keys::DIMS + dim), here);
            for (int q = 0; q < A::ROWS; q++) {
                const Floats query = load(a.query[row + q] + dim);
                store(shares[group][q] + dim, query * scale);
                sums[q] = fma(query, least, sums[q]);
            }
        }
        for (int q = 0; q < A::ROWS; q++) rest[group][q] = sum(sums[q]);
    }
    for (int64_t vector = 0; vector * LANES < count; vector += WIDEST) {
        Floats sums[A::ROWS][WIDEST] = {};
        const uint8_t* codes_of[WIDEST];
        const float* query_of[WIDEST][A::ROWS];
        UNROLL for (int v = 0; v < WIDEST; v++) {
            const int64_t token = (vector + v) * LANES, group = token / Keys::TOKENS;
            codes_of[v] = from[group] + token % Keys::TOKENS * Keys::BITS / 8;
            for (int q = 0; q < A::ROWS; q++) query_of[v][q] = shares[group][q];
        }
        for (int64_t dim = 0; dim < Keys::DIMS; dim++)
            UNROLL for (int v = 0; v < WIDEST; v++) {
                const Floats codes = codes_at<Keys>(codes_of[v], dim * bytes, STEP<Keys>);
                UNROLL for (int q = 0; q < A::ROWS; q++) sums[q][v] = fma(splat(query_of[v][q][dim]), codes, sums[q][v]);
            }
        UNROLL for (int v = 0; v < WIDEST; v++)
            UNROLL for (int q = 0; q < A::ROWS; q++) {
                const Floats offset = splat(rest[(vector + v) * LANES / Keys::TOKENS][q]);
                store(a.scores[row + q] + (vector + v) * LANES, in_order<Keys>(sums[q][v]) + offset);
            }
    }
}

// The weights of queries from `row` on, by the scales of a group, and the sum of what its numbers begin at, by the weights.
template <class Values, class A>
static inline void share_scales(
    A& a, int64_t count, int64_t row, const float* scale, const float* least, float (*shares)[A::STRETCH], float* rest) {
    for (int q = 0; q < A::ROWS; q++) {
        Floats sums{};
        for (int64_t place = 0; place < count; place += LANES) {
            const Floats weight = load(a.scores[row + q] + place), share = weight * load(scale + place);
            store(shares[q] + place, share);
            sums = Values::SIGNED ? sums + share : fma(weight, load(least + place), sums);
        }
        rest[q] = Values::SIGNED ? sum(sums) * Values::LOW : sum(sums);
    }
}

// The scales of a stretch of values, and the weights of some queries by those of a few groups.
template <class Values, class A>
struct Shares {
    float scale[Values::GROUPS][A::STRETCH], least[Values::GROUPS][A::STRETCH];
    alignas(64) float scaled[WIDEST][A::ROWS][A::STRETCH];
    float rest[WIDEST][A::ROWS];
};

// Values of tokens, by their weights, join what was gathered: vectors of channels from number `FIRST` on, for queries from `row` on.
template <class Values, int FIRST, class A>
static inline void values_from(
    A& a, const typename Values::Cell* const* cells, int64_t count, int64_t row, Shares<Values, A>& shares) {
    // Vectors of a group, of all, and those that are summed at once.
    constexpr int64_t each = (Values::GROUP + LANES - 1) / LANES, all = each * Values::GROUPS, wide = std::min<int64_t>(WIDEST, all - FIRST);
    constexpr int64_t group = FIRST / each, last = (FIRST + wide - 1) / each;
    if constexpr (Values::SCALED && !(each % WIDEST == 0 && FIRST % each))
        for (int64_t g = group; g <= last; g++)
            share_scales<Values>(a, count, row, shares.scale[g], shares.least[g], shares.scaled[g - group], shares.rest[g - group]);
    Floats sums[A::ROWS][wide] = {};
    for (int64_t place = 0; place < count; place++) {
        Floats codes[wide];
        UNROLL for (int64_t v = 0; v < wide; v++) {
            const int64_t from = (FIRST + v) % each * STEP<Values>;
            codes[v] = codes_at<Values>(cells[place], (FIRST + v) / each * Values::RUN + from, Values::RUN - from);
        }
        UNROLL for (int q = 0; q < A::ROWS; q++)
            UNROLL for (int64_t v = 0; v < wide; v++) {
                const float* weights = Values::SCALED ? shares.scaled[(FIRST + v) / each - group][q] : a.scores[row + q];
                sums[q][v] = fma(splat(weights[place]), codes[v], sums[q][v]);
            }
    }
    UNROLL for (int q = 0; q < A::ROWS; q++)
        UNROLL for (int64_t v = 0; v < wide; v++) {
            const int64_t dim = (FIRST + v) % each * LANES, here = std::min<int64_t>(LANES, Values::GROUP - dim);
            float* to = a.found.mixed[row + q] + (FIRST + v) / each * Values::GROUP + dim;
            Floats added = in_order<Values>(sums[q][v]);
            if (Values::SCALED) added += splat(shares.rest[(FIRST + v) / each - group][q]);
            store(to, fma(load(to, here), splat(a.shrink[row + q]), added), here);
        }
    if constexpr (FIRST + wide < all) values_from<Values, FIRST + wide>(a, cells, count, row, shares);
}

// All values of a stretch.
template <class Values, class A>
static inline void token_values(A& a, const typename Values::Cell* const* cells, int64_t count) {
    Shares<Values, A> shares;
    read_scales<Values, A::STRETCH>(cells, count, shares.scale, shares.least);
    for (int64_t row = 0; row < a.count; row += A::ROWS) values_from<Values, 0>(a, cells, count, row, shares);
}

// The lines of memory where tokens lie, on their way to the processor before they are needed.
template <class Form, int64_t STRETCH>
static inline void fetch(const typename Form::Cell* const* cells) {
    constexpr int64_t bytes = Form::BY_CHANNEL ? Form::ALL : Form::RUN * Form::GROUPS;
    for (int64_t place = 0; place < STRETCH; place += Form::TOKENS)
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(cells[place]) + byte);
}

// Scores of a stretch of keys for all queries.
template <class Keys, class A>
static inline void scores_of(A& a, const typename Keys::Cell* const* cells, int64_t count) {
    if constexpr (Keys::BY_CHANNEL)
        for (int64_t row = 0; row < a.count; row += A::ROWS) channel_scores<Keys>(a, cells, count, row);
    else if constexpr (!Keys::SCALED)
        for (int64_t row = 0; row < a.count; row += A::ROWS)
            for (int64_t place = 0; place < count; place += LANES) number_scores<Keys>(a, cells, place, row);
    else {
        Tile<Keys, A::STRETCH> tile;
        read_scales<Keys, A::STRETCH>(cells, count, tile.scale, tile.least);
        read_words(cells, count, tile);
        for (int64_t row = 0; row < a.count; row += A::ROWS)
            for (int64_t vector = 0; vector * LANES < count; vector += WIDEST) token_scores(a, tile, row, vector);
    }
}

// Walk what queries see, a stretch after the other; `find(state, start, count, cells)` says where tokens lie. While keys are met with
// queries values are on their way, then the keys behind them.
template <class Keys, class Values, class A, class Find>
static inline void attend_stretches(A& a, const Tensor& keys, const Tensor& values, float scale, float softcap, Find find) {
    const Range seen = seen_by(a);
    const typename Keys::Cell* key_cells[A::STRETCH];
    const typename Values::Cell* value_cells[A::STRETCH];
    // What no query sees is left out as far as that moves no token to another lane; its weights would be 0.
    constexpr int64_t step = std::max<int64_t>(Keys::TOKENS, 16);
    int64_t start = seen.first / step * step, count = std::min(A::STRETCH - start % A::STRETCH, seen.last - start);
    if (seen.first < seen.last) find(keys, start, count, key_cells);
    while (count > 0) {
        find(values, start, count, value_cells);
        fetch<Values, A::STRETCH>(value_cells);
        scores_of<Keys>(a, key_cells, count);
        const int64_t behind = std::min(A::STRETCH, seen.last - start - count);
        if (behind > 0) {
            find(keys, start + count, behind, key_cells);
            fetch<Keys, A::STRETCH>(key_cells);
        }
        weigh(a, start, count, scale, softcap);
        token_values<Values>(a, value_cells, count);
        start += count;
        count = behind;
    }
}

// Walk the pages of a sequence as far as any query sees them.
template <class Keys, class Values, class A>
static inline void attend_pages(
    A& a, const Tensor& keys, const Tensor& values, const int32_t* table, int64_t head, float scale, float softcap) {
    attend_stretches<Keys, Values>(a, keys, values, scale, softcap, [&](auto& pages, int64_t start, int64_t count, auto** cells) {
        find_cells<A>(pages, table, head, start, count, cells);
    });
}
