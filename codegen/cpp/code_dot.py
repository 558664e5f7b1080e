"""Integer products of codes: parts of a weight's words, what multiplies them, and the sum of their products in each lane.

Under `tiles-planes` part s of a word of b-bit codes holds four columns beside each other, one a byte, as four codes of x lie in memory: a
part meets a word of x that is read where it stands. Their products are summed at once where the instruction set does that without
saturating: VNNI always; AVX2 where codes have less than 8 bits, eight times in 16 bits before they join 32; else in halves of 16 bits.
"""

from __future__ import annotations

from qcompile.codegen.cpp.source import Lines, function

CHUNK = 4
"""Words of a row that are taken together at most: 8 products of pairs of 4-bit codes with int8, each at most 3840, stay within 16 bits."""


def dot_helpers(bits: int) -> list[Lines]:
    """`INTb_PARTS`, `intb_part`, `intb_dot`, `intb_open` and `intb_close` for codes of b bits, and what they stand on."""
    return [_count(bits), _PAIRS, _part(bits), _BYTES, _dot(bits), *_near(bits), _WORD, _SUM]


def _few(bits: int) -> bool:
    """Whether two products fit into 16 bits."""
    return bits < 8


def _count(bits: int) -> Lines:
    return [f"// Parts of a word of {bits}-bit codes: four columns each.", f"constexpr int INT{bits}_PARTS = {8 // bits};"]


def _part(bits: int) -> Lines:
    mask = (1 << bits) - 1
    take = f"return codes >> {bits} * s & 0x{mask * 0x01010101:08x};" if bits < 8 else "return codes;"
    head = f"static inline Ints int{bits}_part"
    return function(head, ["Ints codes", "int s"], f"Part `s` of words of {bits}-bit codes, unsigned.", [take])


_PAIRS = function(
    "static inline Ints dot_pairs", ["Ints a", "Ints b", "Ints total"],
    "`total` and the products of each lane's halves of 16 bits.",
    [
        "#if defined(__AVX512F__)",
        "return total + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));",
        "#elif defined(__AVX2__)",
        "return total + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));",
        "#elif defined(__SSE2__)",
        "return total + reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));",
        "#else",
        "return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);",
        "#endif",
    ],
)  # fmt: skip
_BYTES = function(
    "static inline Ints dot_bytes", ["Ints codes", "Ints x", "Ints total"],
    "`total` and the products of each lane's bytes, those of `codes` unsigned, those of `x` signed.",
    [
        "#if defined(__AVX512F__)",
        "return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(",
        "    reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));",
        "#else",
        "typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));",
        "const Ints even = reinterpret_cast<Ints>(reinterpret_cast<Shorts>(x) << 8 >> 8);",
        "const Ints odd = reinterpret_cast<Ints>(reinterpret_cast<Shorts>(x) >> 8);",
        "return dot_pairs(codes >> 8 & 0x00ff00ff, odd, dot_pairs(codes & 0x00ff00ff, even, total));",
        "#endif",
    ],
)  # fmt: skip
_WORD = function(
    "static inline Ints every_lane", ["const int8_t* from"], "Four codes in every lane.",
    ["int32_t word;", "std::memcpy(&word, from, 4);", "return word - Ints{};"],
)  # fmt: skip
ZEROS = function(
    "static inline Ints zero_points", ["const uint8_t* from"], "Zero points of as many rows as there are lanes.",
    [
        "#if defined(__AVX512F__)",
        "return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));",
        "#elif defined(__AVX2__)",
        "return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));",
        "#else",
        "return __builtin_convertvector(load_bits<Bytes>(from), Ints);",
        "#endif",
    ],
)  # fmt: skip
_SUM = function(
    "static inline int32_t sum_codes", ["const int8_t* from", "int64_t count"], "The sum of codes.",
    [
        "#if defined(__AVX512F__)",
        "const __m512i ones = _mm512_set1_epi8(1);",
        "__m512i sums = _mm512_setzero_si512();",
        "for (; count >= 64; count -= 64, from += 64) sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(from));",
        "const __m512i rest = _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, from);",
        "return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(sums, ones, rest));",
        "#else",
        "int32_t total = 0;",
        "#if defined(__AVX2__)",
        "for (; count >= 16; count -= 16, from += 16) {",
        "    // Moved by 128 they are unsigned, and each eight of them are one sum.",
        "    const __m128i codes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), _mm_set1_epi8(-128));",
        "    const __m128i sums = _mm_sad_epu8(codes, _mm_setzero_si128());",
        "    total += _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;",
        "}",
        "#endif",
        "for (int64_t place = 0; place < count; place++) total += from[place];",
        "return total;",
        "#endif",
    ],
)  # fmt: skip


def _dot(bits: int) -> Lines:
    body = ["return dot_bytes(codes, x, total);"]
    if _few(bits):
        sums = "_mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x))"
        fast = f"return reinterpret_cast<Ints>(_mm256_add_epi16(reinterpret_cast<__m256i>(total), {sums}));"
        body = ["#if defined(__AVX2__) && !defined(__AVX512F__)", fast, "#else", *body, "#endif"]
    head, comment = f"static inline Ints int{bits}_dot", "An open `total` and the products of a part with the word of x that it meets."
    return function(head, ["Ints codes", "Ints x", "Ints total"], comment, body)


def _near(bits: int) -> list[Lines]:
    """What sums of a few products are kept in, and how they join the sum of a run."""
    opened, closed = ["return part;"], ["return open;"]
    if _few(bits):
        narrow = "#if defined(__AVX2__) && !defined(__AVX512F__)"
        opened = [narrow, "return Ints{};", "#else", *opened, "#endif"]
        closed = [narrow, "return dot_pairs(open, reinterpret_cast<Ints>(_mm256_set1_epi16(1)), part);", "#else", *closed, "#endif"]
    comment = f"Where products of {CHUNK} words at most are summed: 16 bits where pairs of them fit, else the sum of the run."
    return [
        function(f"static inline Ints int{bits}_open", ["Ints part"], comment, opened),
        function(f"static inline Ints int{bits}_close", ["Ints open", "Ints part"], "The sum of the run with them.", closed),
    ]
