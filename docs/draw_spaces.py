"""Draws `docs/spaces.svg`: which values of the first layer of SmolLM2 change their basis together, for each kind of map.

Run as `python docs/draw_spaces.py`; the checkpoint is downloaded once into the cache.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch

from qcompile.frontend import load
from qcompile.frontend.pinned import smollm2_path
from qcompile.ir.graph import Graph, operator_name
from qcompile.passes.base import PassContext
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.spaces import Kind, find_spaces
from qcompile.target import parse_target

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7")
NONE = "#e8e8e8"
SHOWN = ("embedding", "rms_norm", "linear", "rope", "attention", "gated_activation", "add")
ROW, CELL, TOP = 20, 108, 44
LETTER, GAP = 7, 12
"""Pixels of a letter, at least, and between columns of text."""
TEXT = 'font-family="monospace" font-size="11"'

Cells = dict[str, tuple[int, str]]
"""Node -> number of its space and the shape of its map."""


def spaces_of(graph: Graph, kind: Kind) -> Cells:
    """The free space that each value lives in."""
    return {
        value.node.name: (number, f"{space.blocks} x {space.block_size}" if space.blocks > 1 else str(space.size))
        for number, space in enumerate(find_spaces(graph, kind))
        for value in space.values
    }


def rows_of(graph: Graph) -> list[tuple[str, str]]:
    """The operators of the first layer and the constant that each reads: up to the norm of the second."""
    rows, norms = [], 0
    for node in graph.nodes:
        short = operator_name(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else ""
        norms += short == "rms_norm"
        if norms == 3:
            break
        if short in SHOWN:
            names = [str(used.target) for used in node.all_input_nodes if used.op == "get_attr"]
            short = names[0].removeprefix("model.").removeprefix("layers.0.").removesuffix(".weight") if names else ""
            rows.append((node.name, short))
    return rows


def draw(rows: list[tuple[str, str]], columns: dict[str, Cells]) -> str:
    """One row per value, one column per kind; equal colours within a column change together."""
    middle = 6 + LETTER * max(len(name) for name, _ in rows) + GAP
    left = middle + LETTER * max(len(constant) for _, constant in rows) + GAP
    width, height = left + CELL * len(columns) + 8, TOP + ROW * len(rows) + 8
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for place, (title, cells) in enumerate(columns.items()):
        x, colours = left + CELL * place, dict[int, str]()
        for line, words in enumerate(title.split("\n")):
            parts.append(f'<text x="{x + 4}" y="{18 + 14 * line}" {TEXT}>{escape(words)}</text>')
        for row, (name, _) in enumerate(rows):
            number, shape = cells.get(name, (-1, ""))
            fill = NONE if number < 0 else colours.setdefault(number, COLOURS[len(colours) % len(COLOURS)])
            y = TOP + ROW * row
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 4}" height="{ROW - 3}" rx="3" fill="{fill}"/>')
            parts.append(f'<text x="{x + 6}" y="{y + 12}" {TEXT} fill="white">{shape}</text>')
    for row, (name, constant) in enumerate(rows):
        y = TOP + ROW * row + 12
        parts.append(
            f'<text x="6" y="{y}" {TEXT}>{escape(name)}</text><text x="{middle}" y="{y}" {TEXT} fill="#666">{escape(constant)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Analyse the model before and after `fold-norms`."""
    with torch.no_grad():
        graph = load(smollm2_path()).graph
        target = parse_target("cpu-fp32")
        ctx = PassContext(target)
        run_pipeline(graph, [step for step in default_pipeline(target, "nearest") if step.name in _FIRST], ctx)
        rows = rows_of(graph)
        columns = {kind.value: spaces_of(graph, kind) for kind in (Kind.PERMUTATION, Kind.SIGN, Kind.DIAGONAL, Kind.ORTHOGONAL)}
        FoldNorms().run(graph, ctx)
        columns["orthogonal,\nnorms folded"] = spaces_of(graph, Kind.ORTHOGONAL)
    (Path(__file__).parent / "spaces.svg").write_text(draw(rows, columns))


_FIRST = ("canonicalize", "raise-patterns", "fold-constants", "remove-dead-code")

if __name__ == "__main__":
    main()
