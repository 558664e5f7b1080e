// Operators whose operands may have fewer numbers along an axis than their result: one stands for all.

// Where the numbers begin that row `row` of the result reads.
template <class T>
static inline const T* row_for(const Tensor& from, const Tensor& out, int64_t row) {
    int64_t offset = 0;
    for (int64_t axis = out.rank - 2; axis >= 0; axis--) {
        const int64_t place = axis - out.rank + from.rank, index = row % out.size[axis];
        row /= out.size[axis];
        if (place >= 0 && from.size[place] > 1) offset += index * from.stride[place];
    }
    return static_cast<const T*>(from.data) + offset;
}

// How far apart the numbers are that neighbours of the result read: 0 where one stands for all.
static inline int64_t step_of(const Tensor& from) { return from.rank && from.size[from.rank - 1] > 1; }

// A vector of an operand, as floats.
template <class T>
static inline Floats lanes_of(const T* from, int64_t step, int64_t column, int64_t count) {
    if constexpr (std::is_same<T, float>::value || std::is_same<T, bf16>::value || std::is_same<T, fp16>::value) {
        return step ? load(from + column, count) : splat(get(from));
    } else {
        Floats lanes{};
        for (int64_t lane = 0; lane < count; lane++) lanes[lane] = static_cast<float>(from[(column + lane) * step]);
        return lanes;
    }
}

template <class T>
static inline void put_lanes(T* to, Floats lanes, int64_t count) {
    if constexpr (std::is_same<T, float>::value || std::is_same<T, bf16>::value || std::is_same<T, fp16>::value) {
        store(to, lanes, count);
    } else {
        for (int64_t lane = 0; lane < count; lane++) to[lane] = static_cast<T>(lanes[lane]);
    }
}

// Whether a condition holds, as 1 or 0.
static inline Floats truth(Ints condition) { return choose(condition, splat(1.0f), Floats{}); }
