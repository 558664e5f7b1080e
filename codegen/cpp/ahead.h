// Memory on its way to the processor before it is needed.

// Two lines every 4096 bytes, the addresses of a page, from where the processor goes on by itself.
static inline void fetch(const void* from, int64_t bytes) {
    for (int64_t page = 0; page < bytes; page += 4096)
        for (int64_t byte = page; byte < std::min(bytes, page + 128); byte += 64) __builtin_prefetch(static_cast<const char*>(from) + byte);
}

// What is asked for while something else is computed: where pages begin as soon as it is added, and `next` asks for one line more, of as
// many runs of memory as there is room for.
struct Ahead {
    static constexpr int64_t MOST = 16;
    const char *from[MOST], *to[MOST], *line, *end;
    int64_t count, run;
    Ahead() { clear(); }
    void clear() {
        line = end = nullptr;
        count = run = 0;
    }
    void add(const void* first, int64_t bytes) {
        fetch(first, bytes);
        if (count == MOST) return;
        from[count] = static_cast<const char*>(first);
        to[count++] = static_cast<const char*>(first) + bytes;
    }
    void next() {
        if (line >= end) {
            if (run == count) return;
            line = from[run];
            end = to[run++];
        }
        __builtin_prefetch(line);
        line += 64;
    }
    // What is left.
    void rest() {
        while (line < end || run < count) next();
    }
};
