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

// 16 words of each of 16 rows turned over: the same word of all rows is one vector. Four times a row joins the one 8 further
// on, word by word.
template <class Word>
struct Square {
    typedef Word Row __attribute__((vector_size(TILE * sizeof(Word))));
    Row rows[TILE];

    void turn() {
        UNROLL for (int round = 0; round < 4; round++) {
            Row joined[TILE];
            UNROLL for (int row = 0; row < TILE / 2; row++) {
                const Row one = rows[row], other = rows[row + TILE / 2];
                joined[2 * row] = Row{one[0], other[0], one[1], other[1], one[2], other[2], one[3], other[3],
                                      one[4], other[4], one[5], other[5], one[6], other[6], one[7], other[7]};
                joined[2 * row + 1] = Row{one[8], other[8], one[9], other[9], one[10], other[10], one[11], other[11],
                                          one[12], other[12], one[13], other[13], one[14], other[14], one[15], other[15]};
            }
            UNROLL for (int row = 0; row < TILE; row++) rows[row] = joined[row];
        }
    }
};

// Codes 0, 1, 2 … of each word dealt out: byte i holds codes i, i + 4, i + 8 …, the first of them lowest.
static inline Square<uint32_t>::Row dealt(Square<uint32_t>::Row words, uint32_t bits) {
    Square<uint32_t>::Row made{};
    for (uint32_t code = 0; code < 32 / bits; code++)
        made |= (words >> (code * bits) & ((1u << bits) - 1)) << (code % 4 * 8 + code / 4 * bits);
    return made;
}

// The words of a tile's edge: `rows` rows of `count` bytes; the bytes behind a row's last are 0.
template <class Word>
static Square<Word> edge(const Packing& weight, const uint8_t* from, int64_t rows, int64_t count, Word mask) {
    Square<Word> square{};
    for (int64_t row = 0; row < rows; row++) {
        uint8_t bytes[sizeof square.rows[0]] = {};
        for (int64_t byte = 0; byte < count; byte++) bytes[byte] = from[row * weight.bytes + byte] ^ static_cast<uint8_t>(mask);
        std::memcpy(&square.rows[row], bytes, sizeof bytes);
    }
    return square;
}

// Tile `tile` of a weight, 16 words of its rows at a time; what is not there is 0.
template <class Word>
static void pack_tile(const Packing& weight, int64_t tile) {
    constexpr int64_t size = sizeof(Word), step = TILE * size;
    const int64_t words = (weight.bytes + size - 1) / size, rows = std::min<int64_t>(TILE, weight.rows - tile * TILE);
    const Word mask = static_cast<Word>(static_cast<uint64_t>(weight.mask) * 0x0101010101010101u);
    const uint8_t* from = weight.from + tile * TILE * weight.bytes;
    uint8_t* to = weight.to + tile * words * step;
    // The next tile comes meanwhile, in the order in which it lies in memory.
    for (int64_t byte = TILE * weight.bytes; byte < 2 * TILE * weight.bytes; byte += 64) __builtin_prefetch(from + byte);
    for (int64_t first = 0; first < weight.bytes; first += step, to += TILE * step) {
        Square<Word> square;
        if (rows == TILE && first + step <= weight.bytes) {
            UNROLL for (int row = 0; row < TILE; row++)
                square.rows[row] = load_bits<typename Square<Word>::Row>(from + row * weight.bytes + first) ^ mask;
        } else {
            square = edge<Word>(weight, from + first, rows, std::min(step, weight.bytes - first), mask);
        }
        if constexpr (size == 4)
            for (auto& row : square.rows) row = weight.bits ? dealt(row, weight.bits) : row;
        square.turn();
        std::memcpy(to, square.rows, std::min<int64_t>(TILE, words - first / size) * step);
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
