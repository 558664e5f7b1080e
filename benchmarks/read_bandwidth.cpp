// The speed at which threads read memory once, in order, and do nothing with it: what no product of a weight can beat. `ahead` lines
// are asked for ahead.

#include <cstddef>
#include <cstdint>

typedef uint64_t Line __attribute__((vector_size(64)));

extern "C" uint64_t read_all(const Line* from, size_t lines, int threads, size_t ahead) {
    uint64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : all)
    for (size_t part = 0; part < static_cast<size_t>(threads); part++) {
        Line one{}, two{}, three{}, four{};
        size_t place = lines * part / threads;
        for (const size_t last = lines * (part + 1) / threads; place + 4 <= last; place += 4) {
            if (ahead)
                for (size_t line = 0; line < 4; line++) __builtin_prefetch(from + place + line + ahead, 0, 3);
            one |= from[place];
            two |= from[place + 1];
            three |= from[place + 2];
            four |= from[place + 3];
        }
        one |= two | three | four;
        for (int word = 0; word < 8; word++) all |= one[word];
    }
    return all;
}
