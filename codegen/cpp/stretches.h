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

// The last cell stands behind itself as far as whole vectors of tokens reach.
template <class T>
static inline void fill_cells(const T** cells, int64_t count) {
    for (int64_t place = count; place % LANES; place++) cells[place] = cells[count - 1];
}

// Where tokens lie that follow each other in pages [P, L, R, W], from `start` on; of those that share scales, where the first does.
template <class Form, class T>
static inline void find_cells(
    const Tensor& pages, const int32_t* table, int64_t head, int64_t start, int64_t count, const T** cells, Ahead& ahead) {
    const int64_t page_tokens = pages.size[2], step = pages.stride[2];
    int64_t page = start / page_tokens, row = start % page_tokens;
    for (int64_t place = 0; place < count; page++, row = 0) {
        const T* cell = pages.at<T>(table[page], head, row);
        const int64_t here = std::min(count - place, page_tokens - row);
        ahead.add(cell, here * step * sizeof(T));
        for (int64_t token = 0; token < here; token += Form::TOKENS, cell += Form::TOKENS * step) cells[place + token] = cell;
        place += here;
    }
    if (Form::TOKENS == 1) fill_cells(cells, count);
}

// Numbers of 16 bits at an offset in each cell, as floats. Those of several cells are one vector first: what is stored in small pieces is
// slow to load at once.
template <class T>
static inline void read_halves(const T* const* cells, int64_t count, int64_t offset, float* to) {
    const fp16* kind = nullptr;
    const auto half = [&](int64_t token) {
        uint16_t bits;
        std::memcpy(&bits, reinterpret_cast<const uint8_t*>(cells[token]) + offset, 2);
        return bits;
    };
    for (int64_t place = 0; place < count; place += LANES) {
        Halves halves{};
        UNROLL for (int lane = 0; lane < LANES; lane++) halves[lane] = half(place + lane);
        store(to + place, widen(halves, kind));
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

// The same by sums of integers.
template <class A, class Keys>
static inline void summed_token_scores(A& a, const Tile<Keys, A::STRETCH>& tile, int64_t row, int64_t vector, Ahead& ahead) {
    constexpr int ROWS = most_rows(A::ROWS, MET, Keys::DIGITS);
    constexpr int64_t words = Keys::RUN / 4;
    for (int64_t four = 0; four < Keys::DIMS / 4; four++) ahead.next();
    for (int64_t first = row; first < row + A::ROWS; first += ROWS)
        for (int64_t group = 0; group < Keys::GROUPS; group++) {
            const auto codes_of = [&](int64_t four, int plane, Ints* codes) {
                const Ints* word = tile.words[group * words + four / Keys::PER] + vector;
                UNROLL for (int v = 0; v < MET; v++) codes[v] = plane_of<Keys>(word[v], plane);
            };
            sum_codes<Keys, ROWS, MET, Keys::PER>(&a.by[group][first], words * Keys::PER, codes_of, [&](int q, int v, Floats sum) {
                const int64_t place = (vector + v) * LANES;
                Floats score = load(tile.scale[group] + place) * sum;
                if (!Keys::SIGNED) score += load(tile.least[group] + place) * splat(a.sums[first + q][group]);
                store(a.scores[first + q] + place, group ? load(a.scores[first + q] + place) + score : score);
            });
        }
}

// A query by the scales of the channels of a cell; returns the sum of what their numbers begin at, by the query.
template <class Keys>
static inline float channel_shares(const float* query, const uint8_t* cell, float* shares) {
    Floats sums{};
    for (int64_t dim = 0; dim < Keys::DIMS; dim += LANES) {
        const int64_t here = std::min<int64_t>(LANES, Keys::DIMS - dim);
        const Floats numbers = load(query + dim), share = numbers * halves_at(cell + Keys::BODY + 2 * dim, here);
        store(shares + dim, share);
        if (Keys::SIGNED) sums += share * splat(Keys::LOW);
        else sums = fma(numbers, halves_at(cell + Keys::BODY + 2 * (Keys::DIMS + dim), here), sums);
    }
    return sum(sums);
}

// Scores of tokens that share the scale of each channel, for queries from `row` on, by sums of integers: by itself, as
// inside a larger function fewer sums stay in registers.
template <class Keys, class A>
static __attribute__((noinline)) void summed_scores(A& a, const uint8_t* const* cells, int64_t count, int64_t row, Ahead& ahead) {
    for (int64_t group = 0; group < count; group += Keys::TOKENS) {
        Coefficients<Keys::DIMS> by[A::ROWS];
        const uint8_t* scales = cells[group] + Keys::BODY;
        const auto here = [](int64_t dim) { return std::min<int64_t>(LANES, Keys::DIMS - dim); };
        set_coefficients<Keys, A::ROWS>(
            Keys::DIMS, [&](int q, int64_t dim) { return load(a.query[row + q] + dim); },
            [&](int64_t dim) { return halves_at(scales + 2 * dim, here(dim)); },
            [&](int64_t dim) { return halves_at(scales + 2 * (Keys::DIMS + dim), here(dim)); }, by);
        for (int64_t at = 0; at < Keys::RUN; at += TAKEN_BYTES<Keys>)
            sum_rows<Keys, A::ROWS>(
                by, Keys::DIMS / 4, ahead, [&](int64_t dim) { return cells[group] + dim * Keys::RUN + at; },
                [&](int q, const Floats* sums) {
                    float* to = a.scores[row + q] + group + at * Keys::PER;
                    UNROLL for (int v = 0; v < TAKEN<Keys>; v++) store(to + v * LANES, sums[v] + splat(by[q].rest));
                });
    }
}

// The same by sums of floats: scales join the query.
template <class Keys, class A>
static inline void channel_scores(A& a, const uint8_t* const* cells, int64_t count, int64_t row) {
    constexpr int64_t groups = A::STRETCH / Keys::TOKENS, bytes = Keys::TOKENS * Keys::BITS / 8;
    float shares[groups][A::ROWS][Keys::PLAIN], rest[groups][A::ROWS];
    const uint8_t* from[groups];
    for (int64_t group = 0; group < groups; group++) {
        from[group] = cells[group * Keys::TOKENS < count ? group * Keys::TOKENS : 0];
        for (int q = 0; q < A::ROWS; q++) rest[group][q] = channel_shares<Keys>(a.query[row + q], from[group], shares[group][q]);
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
                const Floats codes = codes_at<Keys, 0>(codes_of[v], dim * bytes, STEP<Keys>);
                UNROLL for (int q = 0; q < A::ROWS; q++) sums[q][v] = fma(splat(query_of[v][q][dim]), codes, sums[q][v]);
            }
        UNROLL for (int v = 0; v < WIDEST; v++)
            UNROLL for (int q = 0; q < A::ROWS; q++) {
                const Floats offset = splat(rest[(vector + v) * LANES / Keys::TOKENS][q]);
                store(a.scores[row + q] + (vector + v) * LANES, in_order<Keys>(sums[q][v]) + offset);
            }
    }
}

// The weights of queries from `row` on, by the scales of a group, and the sum of what the middle codes stand for, by the weights.
template <class Values, class A>
static inline void share_scales(
    A& a, int64_t count, int64_t row, const float* scale, const float* least, float (*shares)[A::STRETCH], float* rest) {
    for (int q = 0; q < A::ROWS; q++) {
        Floats sums{};
        for (int64_t place = 0; place < count; place += LANES) {
            const Floats weight = load(a.scores[row + q] + place), step = load(scale + place);
            store(shares[q] + place, weight * step);
            if (!Values::SIGNED) sums = fma(weight, fma(step, splat(MIDDLE<Values>), load(least + place)), sums);
        }
        rest[q] = Values::SIGNED ? 0.0f : sum(sums);
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
            codes[v] = codes_at<Values, MIDDLE<Values>>(cells[place], (FIRST + v) / each * Values::RUN + from, Values::RUN - from);
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

// The same by sums of integers, all channels: by itself, as `summed_scores`.
template <class Values, class A>
static __attribute__((noinline)) void summed_values(
    A& a, const uint8_t* const* cells, int64_t count, int64_t row, Shares<Values, A>& shares, Ahead& ahead) {
    for (int64_t group = 0; group < Values::GROUPS; group++) {
        Coefficients<A::STRETCH> by[A::ROWS];
        set_coefficients<Values, A::ROWS>(
            count, [&](int q, int64_t place) { return load(a.scores[row + q] + place); },
            [&](int64_t place) { return load(shares.scale[group] + place); },
            [&](int64_t place) { return load(shares.least[group] + place); }, by);
        for (int64_t byte = group * Values::RUN; byte < (group + 1) * Values::RUN; byte += TAKEN_BYTES<Values>)
            sum_rows<Values, A::ROWS>(
                by, (count + 3) / 4, ahead, [&](int64_t place) { return cells[place] + byte; },
                [&](int q, const Floats* sums) {
                    float* to = a.found.mixed[row + q] + byte * Values::PER;
                    const Floats rest = splat(by[q].rest), shrink = splat(a.shrink[row + q]);
                    UNROLL for (int v = 0; v < TAKEN<Values>; v++)
                        store(to + v * LANES, fma(load(to + v * LANES), shrink, sums[v] + rest));
                });
    }
}

// All values of a stretch.
template <class Values, class A>
static inline void token_values(A& a, const typename Values::Cell* const* cells, int64_t count, Ahead& ahead) {
    Shares<Values, A> shares;
    read_scales<Values, A::STRETCH>(cells, count, shares.scale, shares.least);
    for (int64_t row = 0; row < a.count; row += A::ROWS)
        if constexpr (SUMMED<Values>) summed_values(a, cells, count, row, shares, ahead);
        else values_from<Values, 0>(a, cells, count, row, shares);
}

// Scores of a stretch of keys for all queries.
template <class Keys, class A>
static inline void scores_of(A& a, const typename Keys::Cell* const* cells, int64_t count, Ahead& ahead) {
    if constexpr (Keys::BY_CHANNEL && SUMMED<Keys>)
        for (int64_t row = 0; row < a.count; row += A::ROWS) summed_scores<Keys>(a, cells, count, row, ahead);
    else if constexpr (Keys::BY_CHANNEL)
        for (int64_t row = 0; row < a.count; row += A::ROWS) channel_scores<Keys>(a, cells, count, row);
    else if constexpr (!Keys::SCALED)
        for (int64_t row = 0; row < a.count; row += A::ROWS)
            for (int64_t place = 0; place < count; place += LANES) number_scores<Keys>(a, cells, place, row);
    else {
        Tile<Keys, A::STRETCH> tile;
        read_scales<Keys, A::STRETCH>(cells, count, tile.scale, tile.least);
        read_words(cells, count, tile);
        for (int64_t row = 0; row < a.count; row += A::ROWS)
            if constexpr (SUMMED<Keys>)
                for (int64_t vector = 0; vector * LANES < count; vector += MET) summed_token_scores(a, tile, row, vector, ahead);
            else
                for (int64_t vector = 0; vector * LANES < count; vector += WIDEST) token_scores(a, tile, row, vector);
    }
}

// Walk what queries see, a stretch after the other; `find(form, state, start, count, cells, ahead)` says where tokens lie. While keys are
// met with queries values are on their way, then the keys behind them, up to `last`: another part may begin there.
template <class Keys, class Values, class A, class Find>
static inline void attend_stretches(A& a, const Tensor& keys, const Tensor& values, int64_t last, float softcap, Find find) {
    const Range seen = seen_by(a);
    const typename Keys::Cell* key_cells[A::STRETCH];
    const typename Values::Cell* value_cells[A::STRETCH];
    // What no query sees is left out as far as that moves no token to another lane; its weights would be 0.
    constexpr int64_t step = std::max<int64_t>(Keys::TOKENS, 16);
    int64_t start = seen.first / step * step, count = std::min(A::STRETCH - start % A::STRETCH, seen.last - start);
    Ahead ahead;
    if (seen.first < seen.last) find(Keys(), keys, start, count, key_cells, ahead);
    while (count > 0) {
        ahead.clear();
        find(Values(), values, start, count, value_cells, ahead);
        scores_of<Keys>(a, key_cells, count, ahead);
        if constexpr (SUMMED<Keys>) ahead.rest();
        start += count;
        ahead.clear();
        const int64_t behind = std::min(A::STRETCH, last - start);
        if (behind > 0) find(Keys(), keys, start, behind, key_cells, ahead);
        weigh(a, start - count, count, softcap);
        token_values<Values>(a, value_cells, count, ahead);
        if constexpr (SUMMED<Values>) ahead.rest();
        count = std::min(behind, seen.last - start);
    }
}

// Walk the pages of a sequence as far as any query sees them.
template <class Keys, class Values, class A>
static inline void attend_pages(
    A& a, const Tensor& keys, const Tensor& values, const int32_t* table, int64_t head, int64_t last, float softcap) {
    const auto find = [&](auto form, auto& pages, int64_t start, int64_t count, auto** cells, Ahead& ahead) {
        find_cells<decltype(form)>(pages, table, head, start, count, cells, ahead);
    };
    attend_stretches<Keys, Values>(a, keys, values, last, softcap, find);
}
