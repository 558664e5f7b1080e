"""What was done to a model, as files: a listing and a diff after each pass that changed something, and what came out in the end.

Everything but `seconds` in `passes.json` is the same for two compilations of the same input.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qcompile.dump.rows import listing_name, record_row
from qcompile.dump.tables import written
from qcompile.errors import SourceError
from qcompile.ir.lowered import Kernel
from qcompile.ir.records import PassRecord
from qcompile.version import __version__

FORMAT = 1
"""Of a dump's files; raised whenever an older reader would misunderstand them."""
HEADING_FILE, RECORDS_FILE, GRAPHS_FILE, KERNELS_FILE = "dump.json", "passes.json", "graphs.jsonl", "kernels.json"
REPORT_FILE = "report.html"
INPUT_LISTING = "000_input"
"""The graph as traced, before the first pass."""

_OWN_FILE = re.compile(
    r"\d{3}_[a-z0-9-]+\.(txt|diff|spaces\.txt)|pipeline\.txt|graphs\.jsonl|report\.html"
    r"|(dump|passes|coverage|notes|cache|sizes|kernels|distributions|blame)\.json"
)
_CONTEXT_LINES = 2


def prepare(directory: Path) -> None:
    """Make `directory`, without the files of an earlier dump; other files in it are left alone.

    Raises:
        SourceError: if it is a file or cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"dump {directory}: expected a directory that can be made, got {error.strerror}; choose another") from None
    stale = [directory / name for name in _kernel_files(directory)]
    stale += [path for path in directory.iterdir() if path.is_file() and _OWN_FILE.fullmatch(path.name)]
    for path in stale:
        path.unlink(missing_ok=True)


def _kernel_files(directory: Path) -> list[str]:
    """The sources that an earlier dump wrote: others in `kernels/` are the user's."""
    try:
        rows = json.loads((directory / KERNELS_FILE).read_text(encoding="utf-8"))
        names = [str(row["file"]) for row in rows if row["file"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if re.fullmatch(r"kernels/[A-Za-z0-9_.+-]+\.(?:py|cpp)", name)]


def write_json(path: Path, values: Any) -> None:
    """Write JSON values under a temporary name and rename: a reader sees the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_heading(directory: Path, values: Mapping[str, str], *, complete: bool) -> None:
    """Write `dump.json`: the format of the files, what was compiled, and whether the compilation came to its end."""
    write_json(directory / HEADING_FILE, {"format": FORMAT, "qcompile": __version__, "complete": complete, **values})
    (directory / "pipeline.txt").write_text(values["pipeline"] + "\n", encoding="utf-8")


def write_records(directory: Path, records: Sequence[PassRecord]) -> None:
    """Write `passes.json` with the passes so far."""
    write_json(directory / RECORDS_FILE, [record_row(record) for record in records])


def write_diff(directory: Path, record: PassRecord, text_before: str, text_after: str) -> None:
    """Write `NNN_pass-name.diff`."""
    name = listing_name(record)
    (directory / f"{name}.diff").write_text(_diff(text_before, text_after, name), encoding="utf-8")


def write_moments(directory: Path, record: PassRecord, moments: Table) -> None:
    """Write `NNN_pass-name.spaces.txt`: how far the activations of each space stood out before and after the pass."""
    (directory / f"{listing_name(record)}.spaces.txt").write_text(written([moments]), encoding="utf-8")


def write_kernels(directory: Path, rows: Sequence[Mapping[str, Any]], kernels: Mapping[str, Kernel]) -> None:
    """Write the rows as `kernels.json`, and the source of every kernel that has one under `kernels/`."""
    write_json(directory / KERNELS_FILE, rows)
    for row in rows:
        if row["file"]:
            path = directory / row["file"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(kernels[row["name"]].source, encoding="utf-8")


def _diff(before: str, after: str, name: str) -> str:
    """A unified diff; columns are narrowed first, or one longer line would shift, hence change, every other."""
    old, new = (re.sub(r" {2,}", "  ", text).splitlines() for text in (before, after))
    lines = difflib.unified_diff(old, new, fromfile="before", tofile=name, lineterm="", n=_CONTEXT_LINES)
    return "".join(f"{line}\n" for line in lines)
