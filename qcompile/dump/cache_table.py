"""The cache of each layer as a rich table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from qcompile.dump.tables import format_bytes
from qcompile.runtime.cache_layers import CONTEXT, CacheLayer, bits_per_number, folded


def cache_tables(layers: Sequence[CacheLayer]) -> list[Table]:
    """One line per run of layers whose caches are alike, and their sum; no table for a model without a cache.

    Bits per number are those of a sequence of 4096 tokens: pages, tokens in 16 bits and tables, and in the sum the page table.
    """
    return [_table(layers)] if layers else []


def _table(layers: Sequence[CacheLayer]) -> Table:
    table = Table(title=f"cache (bits per number of a sequence of {CONTEXT} tokens)", title_justify="left", show_footer=True)
    table.add_column("layers", footer=f"all {len(layers)}")
    for header in ("keys", "values"):
        table.add_column(header, overflow="fold")
    table.add_column("sinks", justify="right")
    table.add_column("window", justify="right")
    table.add_column("per token", justify="right", footer=format_bytes(sum(layer.bytes_per_token for layer in layers)))
    table.add_column("per sequence", justify="right", footer=format_bytes(sum(layer.bytes_per_sequence for layer in layers)))
    table.add_column("tables", justify="right", footer=format_bytes(sum(layer.table_bytes for layer in layers)))
    table.add_column("bits", justify="right", footer=f"{bits_per_number(layers):.3f}")
    table.add_column("kernel", overflow="fold")
    for name, layer in folded(layers):
        counts = (layer.bytes_per_token, layer.bytes_per_sequence, layer.table_bytes)
        cells = (layer.keys, layer.values, str(layer.sinks), str(layer.window), *map(format_bytes, counts))
        table.add_row(name, *cells, f"{layer.bits_per_number:.3f}", layer.kernel)
    return table
