"""Products of integer codes: words of a weight in parts, words of x that meet them, and the sum of four products a lane.

A part of a word of b-bit codes has one code in each byte: byte j of part s is column `j · 8/b + s` of the word. AVX2 multiplies bytes only
with sums that saturate: where 8 bits could reach that, a part has two codes in halves of 16 bits instead, columns s and s + 2.
"""

from __future__ import annotations

from qcompile.codegen.cpp.source import Lines, function

_PAIRS = "#if defined(__AVX2__) && !defined(__AVX512F__)"
_DOT = [
    "#if defined(__AVX512F__)",
    "return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(",
    "    reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));",
    "#else",
    "UNROLL for (int byte = 0; byte < 4; byte++) total += (codes >> 8 * byte & 0xff) * (x << (24 - 8 * byte) >> 24);",
    "return total;",
    "#endif",
]


def dot_helpers(bits: int) -> list[Lines]:
    """`INTb_PARTS`, `intb_part` and `intb_dot` for codes of b bits."""
    parts, mask = 8 // bits, ((1 << bits) - 1) * 0x01010101
    plain = f"constexpr int INT{bits}_PARTS = {parts};"
    count = [f"// Parts of a word of {bits}-bit codes."]
    shift = f"codes >> {bits} * s" if bits < 8 else "codes"
    take = [f"return {shift} & 0x{mask:08x};"] if bits < 8 else ["return codes;"]
    pairs = "#if defined(__AVX2__) && !defined(__AVX512F__)"
    if bits == 8:
        count += [pairs, "constexpr int INT8_PARTS = 2;", "#else", plain, "#endif"]
        take = [pairs, "return codes >> 8 * s & 0x00ff00ff;", "#else", *take, "#endif"]
        fast = ["const __m256i products = _mm256_madd_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x));"]
    else:
        count += [plain]
        fast = [
            "// At most 2 · 15 · 128 in a half of 16 bits.",
            "const __m256i halves = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x));",
            "const __m256i products = _mm256_madd_epi16(halves, _mm256_set1_epi16(1));",
        ]
    dot = [_PAIRS, *fast, "return total + reinterpret_cast<Ints>(products);", "#else", *_nested(), "#endif"]
    part = f"static inline Ints int{bits}_part"
    head = f"static inline Ints int{bits}_dot"
    return [
        count,
        function(part, ["Ints codes", "int s"], f"Part `s` of words of {bits}-bit codes, unsigned.", take),
        function(head, ["Ints codes", "Ints x", "Ints total"], "`total` and the products of each lane's codes.", dot),
    ]


def _nested() -> Lines:
    return list(_DOT)


def plain_words(bits: int) -> Lines:
    """Columns of x in words that meet the parts of the weight's, and their sum."""
    per, parts = 32 // bits, 8 // bits
    plain = [f"words[s * 4 + place] = piece[place * {parts} + s];"]
    body = [
        "int32_t total = 0;",
        f"for (int64_t start = first / {per} * {per}; start < last; start += {per}, to += INT{bits}_PARTS) {{",
        f"    int8_t piece[{per}] = {{}};",
        f"    const int64_t low = std::max<int64_t>(first - start, 0), high = std::min<int64_t>(last - start, {per});",
        f"    if (!from) std::fill(piece + low, piece + high, 1);",
        f"    else if (high - low == {per}) std::memcpy(piece, from + start, {per});",
        "    else std::memcpy(piece + low, from + start + low, high - low);",
        f"    for (int place = 0; place < {per}; place++) total += piece[place];",
        *(["#if defined(__AVX2__) && !defined(__AVX512F__)",
           "    const int16_t words[4] = {piece[0], piece[2], piece[1], piece[3]};",
           "#else"] if bits == 8 else []),
        f"    int8_t words[{per}];",
        f"    for (int s = 0; s < {parts}; s++)",
        f"        for (int place = 0; place < 4; place++) {plain[0]}",
        *(["#endif"] if bits == 8 else []),
        "    std::memcpy(to, words, sizeof words);",
        "}",
        "return total;",
    ]  # fmt: skip
    head = f"static inline int32_t int{bits}_words"
    comment = "Columns `first` to `last` of a row of codes, or of ones, in words; other columns of these are 0. Returns their sum."
    return function(head, ["const int8_t* from", "int64_t first", "int64_t last", "int32_t* to"], comment, body)
