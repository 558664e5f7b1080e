"""Words by which a file of another system tells of a packed weight: our exporters write them, our front ends read them.

Entries begin with `PREFIX`: `format` (as `parse_format` reads it), `columns` (K), `layout` of the codes, and for each part of the format
(`codes`, `scale`, `zero`, `scale2`) the name of what holds it.
"""

PREFIX = "qcompile."
PACKED = "packed"
"""Rows of bytes, as here."""
ROWS, COLUMNS = "rows", "columns"
"""A number for each code, [N, K] or [K, N]."""
BLOCKS = "blocks"
"""[N, blocks, bytes], as onnxruntime's MatMulNBits has them: rows of bytes, filled up."""
LOOKUP = "lookup"
"""Rows of bytes, of which indices take some."""
LAYOUTS = (PACKED, ROWS, COLUMNS, BLOCKS, LOOKUP)
