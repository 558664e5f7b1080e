"""Products of integer codes: words of a weight in parts, words of x that meet them, and the sum of their products in each lane.

A part of a word of b-bit codes has codes side by side that are multiplied at once with as many of x: four in bytes where the instruction
set sums products of bytes without saturating (VNNI always; AVX2 where codes have less than 8 bits), else two in halves of 16 bits.
With P parts in a word, place i of part s is column `P·i + s` of the word.
"""

from __future__ import annotations

from qcompile.codegen.cpp.source import Lines, block, function


def parts_comment(bits: int) -> Lines:
    """`INTb_PARTS` of a word, `INTb_PLACES` in a part, and `IntbPlace`, what a place of x is stored in."""
    return [
        f"// Parts of a word of {bits}-bit codes, places in each, and a number of x at a place.",
        f"#if {_bytes(bits)}",
        f"constexpr int INT{bits}_PARTS = {8 // bits}, INT{bits}_PLACES = 4;",
        f"typedef int8_t Int{bits}Place;",
        "#else",
        f"constexpr int INT{bits}_PARTS = {16 // bits}, INT{bits}_PLACES = 2;",
        f"typedef int16_t __attribute__((may_alias)) Int{bits}Place;",
        "#endif",
    ]


def _bytes(bits: int) -> str:
    """The condition for products of bytes."""
    return "defined(__AVX512F__)" if bits == 8 else "defined(__AVX2__)"


def dot_helpers(bits: int) -> list[Lines]:
    """`INTb_PARTS`, `intb_part`, `intb_dot` and `intb_words` for codes of b bits."""
    return [parts_comment(bits), _PAIRS, _part(bits), *([] if bits == 8 else [_BYTES]), _dot(bits), _words(bits), _SUM]


def _part(bits: int) -> Lines:
    mask = (1 << bits) - 1
    take = [
        f"#if {_bytes(bits)}",
        f"return codes >> {bits} * s & 0x{mask * 0x01010101:08x};" if bits < 8 else "return codes;",
        "#else",
        f"return codes >> {bits} * s & 0x{mask * 0x00010001:08x};",
        "#endif",
    ]
    head = f"static inline Ints int{bits}_part"
    return function(head, ["Ints codes", "int s"], f"Part `s` of words of {bits}-bit codes, unsigned.", take)


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
_BYTES = [
    "#if defined(__AVX2__)",
    *function(
        "static inline Ints dot_few", ["Ints codes", "Ints x", "Ints total"],
        "`total` and the products of each lane's bytes, codes below 16: two of them stay within 16 bits.",
        [
            "#if defined(__AVX512F__)",
            "return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(",
            "    reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));",
            "#else",
            "const __m256i halves = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x));",
            "return total + reinterpret_cast<Ints>(_mm256_madd_epi16(halves, _mm256_set1_epi16(1)));",
            "#endif",
        ],
    ),
    "#endif",
]  # fmt: skip


_SUM = function(
    "static inline int32_t sum_codes", ["const int8_t* from", "int64_t count"], "The sum of codes.",
    [
        "#if defined(__AVX512F__)",
        "__m512i total = _mm512_setzero_si512();",
        "const __m512i ones = _mm512_set1_epi8(1);",
        "for (; count >= 64; count -= 64, from += 64) total = _mm512_dpbusd_epi32(total, ones, _mm512_loadu_si512(from));",
        "const __m512i rest = _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, from);",
        "return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(total, ones, rest));",
        "#else",
        "int32_t total = 0;",
        "for (int64_t place = 0; place < count; place++) total += from[place];",
        "return total;",
        "#endif",
    ],
)  # fmt: skip


def _dot(bits: int) -> Lines:
    fast = ["return dot_few(codes, x, total);"]
    if bits == 8:
        fast = [
            "return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(",
            "    reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));",
        ]
    body = [f"#if {_bytes(bits)}", *fast, "#else", "return dot_pairs(codes, x, total);", "#endif"]
    head = f"static inline Ints int{bits}_dot"
    return function(head, ["Ints codes", "Ints x", "Ints total"], "`total` and the products of a part with what it meets.", body)


def _words(bits: int) -> Lines:
    """Columns of x as the parts of a weight's words meet them."""
    per = 32 // bits
    edge = [
        f"const int64_t column = word * {per} + place * INT{bits}_PARTS + s;",
        f"piece[(word - begin) * INT{bits}_PLACES + place] = column < first || column >= last ? 0 : from ? from[column] : 1;",
    ]
    each = [
        f"auto* piece = reinterpret_cast<Int{bits}Place*>(to + s * plane);",
        *block("const auto edge = [&](int64_t word)", block(f"for (int place = 0; place < INT{bits}_PLACES; place++)", edge))[:-1],
        "};",
        "if (begin < whole) edge(begin);",
        f"auto* inside = piece + (whole - begin) * INT{bits}_PLACES;",
        f"const int64_t count = (rest - whole) * INT{bits}_PLACES;",
        "if (!from) for (int64_t at = 0; at < count; at++) inside[at] = 1;",
        f"else for (int64_t at = 0; at < count; at++) inside[at] = from[whole * {per} + at * INT{bits}_PARTS + s];",
        "if (rest < end && rest >= whole) edge(rest);",
    ]
    body = [
        f"const int64_t begin = first / {per}, end = (last + {per - 1}) / {per};",
        "// Words that lie inside as a whole.",
        f"const int64_t whole = (first + {per - 1}) / {per}, rest = last / {per};",
        *block(f"for (int s = 0; s < INT{bits}_PARTS; s++)", each),
    ]
    comment = "Columns `first` to `last` of a row of codes, or of ones, in words, part s `s * plane` further; other columns are 0."
    parameters = ["const int8_t* from", "int64_t first", "int64_t last", "int32_t* to", "int64_t plane"]
    return function(f"static void int{bits}_words", parameters, comment, body)
