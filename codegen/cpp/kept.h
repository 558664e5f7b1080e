// Where tokens are kept that are attended as they came; those before `least`, which no query sees, stand for nothing.
template <class Policy, class T>
static inline void find_kept(
    const Tensor& exact, const Tensor& positions, const Arrivals& row, int64_t head, int64_t start, int64_t count, int64_t least,
    const T** cells) {
    for (int64_t place = 0; place < count; place++) {
        cells[place] = exact.at<T>(row.batch, head, column_of<Policy>(positions, row, std::max(start + place, least)));
        fetch(cells[place], exact.size[3] * sizeof(T));
    }
    fill_cells(cells, count);
}

// Walk what a sequence keeps as it came, in stretches as `attend_pages`.
template <class Policy, class Kept, class A>
static inline void attend_kept(
    A& a, const Tensor& keys, const Tensor& values, const Tensor& positions, const Arrivals& row, int64_t head,
    float softcap) {
    const Range seen = seen_by(a);
    const auto find = [&](auto, auto& exact, int64_t start, int64_t count, auto** cells, Ahead&) {
        find_kept<Policy>(exact, positions, row, head, start, count, seen.first, cells);
    };
    attend_stretches<Kept, Kept>(a, keys, values, seen.last, softcap, find);
}
