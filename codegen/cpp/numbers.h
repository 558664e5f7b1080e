// Attention over vectors of numbers as they are.
// Scores of keys that are numbers.
template <class Keys, class T, class A>
static inline void number_scores(A& a, const T* const* cells, int64_t count) {
    for (int64_t place = 0; place < count; place += LANES) {
        const int64_t here = std::min<int64_t>(LANES, count - place);
        Floats products[A::Q][LANES];
        for (int64_t key = 0; key < LANES; key++) {
            const T* from = cells[place + std::min(key, here - 1)];
            Floats product[A::Q] = {};
            for (int64_t dim = 0; dim < Keys::DIMS; dim += LANES) {
                const Floats numbers = load(from + dim, std::min<int64_t>(LANES, Keys::DIMS - dim));
                UNROLL for (int q = 0; q < A::Q; q++) product[q] = fma(load(a.plain[q] + dim), numbers, product[q]);
            }
            UNROLL for (int q = 0; q < A::Q; q++) products[q][key] = product[q];
        }
        for (int q = 0; q < A::Q; q++) store(a.scores[q] + place, sums_of(products[q]));
    }
}

// Values that are numbers, by their weights, join what was gathered, in the order of channels.
template <class Values, class T, class A>
static inline void number_values(A& a, const T* const* cells, int64_t count) {
    for (int64_t dim = 0; dim < Values::DIMS; dim += LANES) {
        const int64_t here = std::min<int64_t>(LANES, Values::DIMS - dim);
        Floats sums[A::Q] = {};
        for (int64_t place = 0; place < count; place++) {
            const Floats numbers = load(cells[place] + dim, here);
            UNROLL for (int q = 0; q < A::Q; q++) sums[q] = fma(splat(a.scores[q][place]), numbers, sums[q]);
        }
        for (int q = 0; q < A::Q; q++) store(a.mixed[q] + dim, load(a.mixed[q] + dim) + sums[q]);
    }
}

// Walk the pages of a sequence; stretches begin at multiples of their length, so that a query's sums know no other's range.
template <class Keys, class T, class A>
static inline void attend_numbers(
    A& a, const Tensor& keys, const Tensor& values, const int32_t* table, int64_t head, float scale, float softcap) {
    const Range seen = seen_by(a);
    for (int64_t start = seen.first / A::STRETCH * A::STRETCH; start < seen.last; start += A::STRETCH) {
        const int64_t count = std::min(A::STRETCH, seen.last - start);
        const T* cells[A::STRETCH];
        find_cells(keys, table, head, start, count, cells);
        number_scores<Keys>(a, cells, count);
        weigh(a, start, count, scale, softcap);
        find_cells(values, table, head, start, count, cells);
        number_values<Keys>(a, cells, count);
    }
}
