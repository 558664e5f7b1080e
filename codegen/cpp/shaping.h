// Where rows of a result come from along one axis that is not the last.

// Row `row` of `out`, whose place along `axis` is `place` there: the row of a tensor that is as large but along that axis.
static inline int64_t row_along(const Tensor& out, int64_t row, int64_t axis, int64_t length, int64_t place) {
    int64_t below = 1;
    for (int64_t inner = axis + 1; inner < out.rank - 1; inner++) below *= out.size[inner];
    return (row / (below * out.size[axis]) * length + place) * below + row % below;
}

static inline int64_t place_along(const Tensor& out, int64_t row, int64_t axis) {
    for (int64_t inner = out.rank - 2; inner > axis; inner--) row /= out.size[inner];
    return row % out.size[axis];
}
