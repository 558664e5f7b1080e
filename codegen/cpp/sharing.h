// How the threads of a team share queries, or, where these are few, the parts of the sequences that they see.
// Blocks of queries for each thread, up to which parts are shared: more of them keep all threads busy.
constexpr int64_t MOST_BLOCKS = 4;

// Blocks in order: those that follow each other see about as much.
struct Numbered {
    int64_t pairs, heads, beside, most;
    Block operator()(int64_t number) const {
        const int64_t pair = number % pairs, first = number / pairs * most;
        return {pair / heads, pair % heads, first, std::min(most, beside - first)};
    }
};

// Many blocks: threads take them in turn, and walk all that these see, part after part.
template <class A, class Look, class Read, class Walk, class Put>
static inline void share_blocks(const Team& team, int64_t count, Numbered block_of, Look look, Read read, Walk walk, Put put) {
    A a;
    Gathered<A::Q, A::ROOM> whole;
    for (int64_t number = team.thread; number < count; number += team.threads) {
        const Block block = block_of(number);
        const Range parts = look(a, block);
        read(a, block, whole);
        for (int64_t part = parts.first; part < parts.last; part++) {
            clear(a.found, block.count);
            walk(a, block, part, parts);
            join(whole, a.found, block.count);
        }
        put(whole, block);
    }
}

// Few blocks: threads share the parts of their sequences. What a part gave stands in memory that they share too, as many parts at a
// time as have room there; the thread that owns a block puts its parts together.
template <class A, class Look, class Read, class Walk, class Put>
static inline void share_parts(const Team& team, int64_t count, Numbered block_of, Look look, Read read, Walk walk, Put put) {
    typedef Gathered<A::Q, A::ROOM> Found;
    constexpr int64_t room = SHARED_BYTES / sizeof(Found);
    static_assert(room > 0, "a part has room");
    Found *shared = static_cast<Found*>(team.shared), whole[MOST_BLOCKS];
    A a;
    int64_t units = 0;
    for (int64_t number = 0; number < count; number++) {
        const Range parts = look(a, block_of(number));
        units += parts.last - parts.first;
        if (number % team.threads == team.thread) read(a, block_of(number), whole[number / team.threads]);
    }
    team.wait();
    for (int64_t first = 0; first < units; first += room) {
        const Range mine = team.share(std::min(room, units - first));
        for (int64_t number = 0, next = -first; number < count; number++) {
            const Block block = block_of(number);
            const Range parts = look(a, block);
            const int64_t after = next + parts.last - parts.first, end = std::min(after, mine.last);
            for (int64_t unit = std::max(next, mine.first), begin = unit; unit < end; unit++) {
                Found unused;
                if (unit == begin) read(a, block, unused);
                clear(a.found, block.count);
                walk(a, block, parts.first + unit - next, parts);
                shared[unit] = a.found;
            }
            next = after;
        }
        team.wait();
        for (int64_t number = 0, next = -first; number < count; number++) {
            const Block block = block_of(number);
            const Range parts = look(a, block);
            const int64_t after = next + parts.last - parts.first, end = std::min({after, room, units - first});
            if (number % team.threads == team.thread)
                for (int64_t unit = std::max<int64_t>(next, 0); unit < end; unit++)
                    join(whole[number / team.threads], shared[unit], block.count);
            next = after;
        }
        if (first + room < units) team.wait();
    }
    for (int64_t number = team.thread; number < count; number += team.threads) put(whole[number / team.threads], block_of(number));
}

// Attention of `beside` queries of each head of keys of each sequence; `look` says what a block sees, `read` reads its queries, `walk`
// goes through a part, `put` stores what was gathered.
template <class A, class Look, class Read, class Walk, class Put>
static inline void attend(
    const Team& team, int64_t batches, int64_t heads, int64_t beside, Look look, Read read, Walk walk, Put put) {
    const Numbered block_of{batches * heads, heads, beside, A::Q};
    const int64_t count = block_of.pairs * ((beside + A::Q - 1) / A::Q);
    if (team.threads > 1 && count <= MOST_BLOCKS * team.threads) share_parts<A>(team, count, block_of, look, read, walk, put);
    else share_blocks<A>(team, count, block_of, look, read, walk, put);
}
