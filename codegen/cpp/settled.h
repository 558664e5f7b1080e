// Caches that keep some tokens as they came, as `quant/retention.py` and `ir/retention_ops.py` define them.

// Which tokens settle: never the first ones, nor the last `recent`; so many at once as a group has.
template <int64_t first, int64_t recent, int64_t group>
struct Retention {
    static constexpr int64_t FIRST = first, GROUP = group, TURNING = recent + group - 1, ROWS = first + TURNING;
    // Where settled tokens end in a sequence.
    static int64_t settled(int64_t length) { return first + std::max<int64_t>(0, length - first - recent) / group * group; }
    // Where a token that has not settled is kept.
    static int64_t row(int64_t position) { return position < first ? position : first + (position - first) % TURNING; }
};

// A row of the batch: tokens from `start` up to `end` come in this call, the first of them at `place`.
struct Arrivals {
    int64_t batch, start, end, place;
};

static inline Arrivals arrivals_of(const Tensor& positions, int64_t batch) {
    Arrivals found{batch, 0, 0, 0};
    for (int64_t place = positions.size[1] - 1; place >= 0; place--) {
        const int64_t position = *positions.at<int64_t>(batch, place);
        if (position < 0) continue;
        if (!found.end) found.end = position + 1;
        found.start = position;
        found.place = place;
    }
    return found;
}

// Where an unsettled token stands in what `with_recent` gave: among the rows, or behind them where it came.
template <class Policy>
static inline int64_t column_of(const Tensor& positions, const Arrivals& row, int64_t position) {
    if (position < row.start) return Policy::row(position);
    // Padding stands before or behind what comes, seldom inside it.
    int64_t place = row.place + position - row.start;
    while (*positions.at<int64_t>(row.batch, place) != position) place++;
    return Policy::ROWS + place;
}
