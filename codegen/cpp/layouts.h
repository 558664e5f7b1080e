// Weights in the order that kernels read them (`qcompile/ir/layouts.py` defines it): rows [N, C] of words become
// [ceil(N/16), C, 16], so that one word of 16 rows is a vector. Made once, when an artifact is loaded.

// One weight: its stored rows of `bytes` bytes each, and where its tiles go.
struct Packing {
    const uint8_t* from;
    uint8_t* to;
    int64_t rows, bytes;
    int64_t word_bytes;  // 1, 2, 4 or 8
    int64_t mask;        // what each byte is combined with by exclusive or: it moves codes to their middle
    int64_t bits;        // of the codes in a word of 4 bytes that are dealt to its bytes in turn; 0 leaves words as they are
};

// Codes 0, 1, 2 … of a word dealt out: byte i holds codes i, i + 4, i + 8 …, the first of them lowest.
template <class Word>
static inline Word dealt(Word word, int64_t bits) {
    if (sizeof(Word) != 4 || bits == 0) return word;
    uint32_t made = 0;
    for (int64_t code = 0; code < 32 / bits; code++) {
        const uint32_t value = static_cast<uint32_t>(word) >> (code * bits) & ((1u << bits) - 1);
        made |= value << (code % 4 * 8 + code / 4 * bits);
    }
    return static_cast<Word>(made);
}

// Tile `tile` of a weight: blocks of 16 words of its 16 rows are turned over; what is not there is 0.
template <class Word>
static void pack_tile(const Packing& weight, int64_t tile) {
    constexpr int64_t size = sizeof(Word), block = 16;
    const int64_t words = (weight.bytes + size - 1) / size, rows = std::min<int64_t>(TILE, weight.rows - tile * TILE);
    const uint64_t mask = static_cast<uint64_t>(weight.mask) * 0x0101010101010101u;
    Word* to = reinterpret_cast<Word*>(weight.to) + tile * words * TILE;
    for (int64_t first = 0; first < words; first += block) {
        const int64_t count = std::min(block, words - first), taken = std::min(count * size, weight.bytes - first * size);
        Word held[TILE][block] = {};
        for (int64_t row = 0; row < rows; row++) {
            std::memcpy(held[row], weight.from + (tile * TILE + row) * weight.bytes + first * size, taken);
            for (int64_t word = 0; word < count; word++) held[row][word] ^= static_cast<Word>(mask);
            // The bytes behind a row's last stay 0.
            uint8_t* bytes = reinterpret_cast<uint8_t*>(held[row]);
            for (int64_t byte = taken; byte < count * size; byte++) bytes[byte] = 0;
            if (weight.bits) for (int64_t word = 0; word < count; word++) held[row][word] = dealt(held[row][word], weight.bits);
        }
        for (int64_t word = 0; word < count; word++)
            for (int64_t row = 0; row < TILE; row++) to[(first + word) * TILE + row] = held[row][word];
    }
}

struct Packings {
    const Packing* weights;
    int64_t count;
};

static void pack_all(const Team& team, Packings all) {
    for (int64_t index = 0; index < all.count; index++) {
        const Packing& weight = all.weights[index];
        const Range mine = team.share((weight.rows + TILE - 1) / TILE);
        for (int64_t tile = mine.first; tile < mine.last; tile++) {
            switch (weight.word_bytes) {
                case 1: pack_tile<uint8_t>(weight, tile); break;
                case 2: pack_tile<uint16_t>(weight, tile); break;
                case 4: pack_tile<uint32_t>(weight, tile); break;
                default: pack_tile<uint64_t>(weight, tile);
            }
        }
    }
}

// All weights of an artifact, by the threads of a team.
extern "C" void qcompile_pack(const Packing* weights, int64_t count, int64_t threads) {
    run(threads, pack_all, Packings{weights, count});
}
