// Attention over keys and values that stand side by side, without a cache: blocks of queries walk over blocks of keys.

// Queries that are taken together, and keys: a query's sums are the same whichever queries are beside it.
constexpr int64_t QUERIES = 16, KEYS = 64;
static_assert(KEYS % LANES == 0, "whole vectors of keys");

// What a block of queries has gathered. Rows of `turned` are the numbers of KEYS keys at one place of their vectors.
template <int64_t dims>
struct Gathered {
    static constexpr int64_t ROOM = (dims + LANES - 1) / LANES * LANES;
    alignas(64) float turned[dims][KEYS], scores[QUERIES][KEYS], mixed[QUERIES][ROOM];
    float peak[QUERIES], total[QUERIES];
    int64_t first[QUERIES], last[QUERIES];  // keys that a query may see
};

// Scores of a block of keys from `start` on become weights; what was gathered shrinks as the peak grows.
template <class A>
static inline void weigh_block(A& a, int64_t q, int64_t start, const bool* there, float scale, float softcap) {
    Floats highest = splat(-INFINITY), total{};
    for (int64_t key = 0; key < KEYS; key += LANES) {
        Floats score = load(a.scores[q] + key) * splat(scale);
        if (softcap != 0.0f) score = splat(softcap) * tanh(score / splat(softcap));
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t place = start + key + lane;
            if (place < a.first[q] || place >= a.last[q] || !there[key + lane]) score[lane] = -INFINITY;
        }
        store(a.scores[q] + key, score);
        highest = largest(highest, score);
    }
    const float next = std::max(a.peak[q], largest(highest)), base = next == -INFINITY ? 0.0f : next;
    const Floats shrink = exp(splat(a.peak[q] - base));
    a.peak[q] = next;
    for (int64_t key = 0; key < KEYS; key += LANES) {
        const Floats weight = exp(load(a.scores[q] + key) - splat(base));
        store(a.scores[q] + key, weight);
        total += weight;
    }
    a.total[q] = a.total[q] * shrink[0] + sum(total);
    for (int64_t dim = 0; dim < A::ROOM; dim += LANES) store(a.mixed[q] + dim, load(a.mixed[q] + dim) * shrink);
}

// A block of `count` queries of one head over the keys from `start` on.
template <int64_t dims, class T, class A>
static inline void attend_block(
    A& a, const Tensor& q, const Tensor& k, const Tensor& v, int64_t batch, int64_t head, int64_t shared, int64_t query, int64_t count,
    int64_t start, const bool* there, float scale, float softcap) {
    const int64_t keys = std::min(KEYS, k.size[2] - start);
    for (int64_t key = 0; key < KEYS; key++) {
        const T* from = k.at<T>(batch, shared, start + std::min(key, keys - 1));
        for (int64_t dim = 0; dim < dims; dim++) a.turned[dim][key] = get(from + dim);
    }
    for (int64_t i = 0; i < count; i++) {
        const T* from = q.at<T>(batch, head, query + i);
        Floats sums[KEYS / LANES] = {};
        for (int64_t dim = 0; dim < dims; dim++) {
            const Floats value = splat(get(from + dim));
            UNROLL for (int part = 0; part < KEYS / LANES; part++)
                sums[part] = fma(load(a.turned[dim] + part * LANES), value, sums[part]);
        }
        for (int part = 0; part < KEYS / LANES; part++) store(a.scores[i] + part * LANES, sums[part]);
        weigh_block(a, i, start, there, scale, softcap);
    }
    for (int64_t dim = 0; dim < dims; dim += LANES) {
        const int64_t here = std::min<int64_t>(LANES, dims - dim);
        Floats sums[QUERIES] = {};
        for (int64_t key = 0; key < keys; key++) {
            const Floats value = load(v.at<T>(batch, shared, start + key) + dim, here);
            UNROLL for (int64_t i = 0; i < QUERIES; i++) sums[i] = fma(splat(a.scores[i][key]), value, sums[i]);
        }
        for (int64_t i = 0; i < count; i++) store(a.mixed[i] + dim, load(a.mixed[i] + dim) + sums[i]);
    }
}
