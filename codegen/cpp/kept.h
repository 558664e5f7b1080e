// Where tokens are kept that are attended as they came; those before `least`, which no query sees, stand for nothing.
template <class Policy, class T>
static inline void find_kept(
    const Tensor& exact, const Tensor& positions, const Arrivals& row, int64_t head, int64_t start, int64_t count, int64_t least,
    const T** cells) {
    for (int64_t place = 0; place < count; place++) {
        const int64_t position = std::max(start + place, least);
        cells[place] = exact.at<T>(row.batch, head, column_of<Policy>(positions, row, position));
    }
}

// Scores of numbers as they came.
template <class Keys, class T, class A>
static inline void kept_scores(A& a, const T* const* cells, int64_t count) {
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

// Values as they came, by their weights, join what was gathered, in the order of channels.
template <class Values, class T, class A>
static inline void kept_values(A& a, const T* const* cells, int64_t count) {
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

// Walk what a sequence keeps as it came, in stretches as `attend_pages`.
template <class Policy, class Keys, class Values, class T, class A>
static inline void attend_kept(
    A& a, const Tensor& keys, const Tensor& values, const Tensor& positions, const Arrivals& row, int64_t head, float scale,
    float softcap) {
    const Range seen = seen_by(a);
    for (int64_t start = seen.first / A::STRETCH * A::STRETCH; start < seen.last; start += A::STRETCH) {
        const int64_t count = std::min(A::STRETCH, seen.last - start);
        const T* cells[A::STRETCH];
        find_kept<Policy>(keys, positions, row, head, start, count, seen.first, cells);
        kept_scores<Keys>(a, cells, count);
        weigh(a, start, count, scale, softcap);
        find_kept<Policy>(values, positions, row, head, start, count, seen.first, cells);
        kept_values<Values>(a, cells, count);
    }
}
