"""What was done to a model, as files: a listing and a diff after each pass that changed something, and a summary.

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

from qcompile.dump.tables import written
from qcompile.errors import SourceError
from qcompile.ir.lowered import Kernel
from qcompile.ir.records import PassRecord

INPUT_FILE = "000_input.txt"
"""The graph as traced, before the first pass."""

_OWN_FILE = re.compile(r"\d{3}_[a-z0-9-]+\.(txt|diff|spaces\.txt)|pipeline\.txt|passes\.json")
_CONTEXT_LINES = 2
MEASURED = ("max_error", "sqnr_db", "kl", "total_sqnr_db", "total_kl")
"""What the numeric check adds to a record; null where it does not apply."""


def prepare(directory: Path) -> None:
    """Make `directory`, without the files of an earlier dump; other files in it are left alone.

    Raises:
        SourceError: if it is a file or cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"dump {directory}: expected a directory that can be made, got {error.strerror}; choose another") from None
    # Only beside a finished dump is `kernels/` known to be a dump's and not the user's.
    stale = list((directory / "kernels").glob("*.py")) if (directory / "passes.json").is_file() else []
    stale += [path for path in directory.iterdir() if path.is_file() and _OWN_FILE.fullmatch(path.name)]
    for path in stale:
        path.unlink()


def write_pass(directory: Path, record: PassRecord, text_before: str, text_after: str) -> None:
    """Write `NNN_pass-name.txt` and `.diff` if the pass changed something; NNN counts from 001, after the input."""
    if not record.changed:
        return
    stem = _stem(record)
    (directory / f"{stem}.txt").write_text(text_after, encoding="utf-8")
    (directory / f"{stem}.diff").write_text(_diff(text_before, text_after, stem), encoding="utf-8")


def write_moments(directory: Path, record: PassRecord, moments: Table) -> None:
    """Write `NNN_pass-name.spaces.txt`: how far the activations of each space stood out before and after the pass."""
    (directory / f"{_stem(record)}.spaces.txt").write_text(written([moments]), encoding="utf-8")


def write_summary(directory: Path, pipeline: str, records: Sequence[PassRecord], kernels: Mapping[str, Kernel]) -> None:
    """Write `pipeline.txt`, `passes.json`, and the source of every kernel that has one under `kernels/`."""
    (directory / "pipeline.txt").write_text(pipeline + "\n", encoding="utf-8")
    rows = [record_row(record) for record in records]
    (directory / "passes.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sources = directory / "kernels"
    for kernel in kernels.values():
        if kernel.source:
            sources.mkdir(exist_ok=True)
            (sources / f"{kernel.name}.py").write_text(kernel.source, encoding="utf-8")


def record_row(record: PassRecord) -> dict[str, Any]:
    """A record as JSON values; what the check measures is null where it was not checked, `listing` where nothing changed."""
    return {
        "index": record.index,
        "name": record.name,
        "spec": record.spec,
        "changed": record.changed,
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "seconds": round(record.seconds, 4),
        "exact": record.exact,
        "checked": record.checked,
        **{name: getattr(record, name) for name in MEASURED},
        "bytes": record.constant_bytes,
        "listing": f"{_stem(record)}.txt" if record.changed else None,
    }


def read_summary(directory: Path) -> tuple[str, list[PassRecord]]:
    """The pipeline text and the records of a dump directory.

    Raises:
        SourceError: if `directory` holds no dump, or a damaged one.
    """
    try:
        rows = json.loads((directory / "passes.json").read_text(encoding="utf-8"))
        pipeline = (directory / "pipeline.txt").read_text(encoding="utf-8").strip()
        return pipeline, [_record(row) for row in rows]
    except OSError as error:
        raise SourceError(f"{directory}: expected a dump (passes.json, pipeline.txt), got {error.strerror}; see --dump") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{directory / 'passes.json'}: expected the records of a dump, got {error!r}; write it anew") from None


def _record(row: dict[str, Any]) -> PassRecord:
    return PassRecord(
        row["index"], row["name"], row["spec"], row["changed"], row["nodes_before"], row["nodes_after"], row["seconds"],
        row["bytes"], exact=row.get("exact"), **{name: row.get(name) for name in MEASURED},
    )  # fmt: skip


def _stem(record: PassRecord) -> str:
    return f"{record.index + 1:03d}_{record.name}"


def _diff(before: str, after: str, name: str) -> str:
    """A unified diff; columns are narrowed first, or one longer line would shift, hence change, every other."""
    old, new = (re.sub(r" {2,}", "  ", text).splitlines() for text in (before, after))
    lines = difflib.unified_diff(old, new, fromfile="before", tofile=name, lineterm="", n=_CONTEXT_LINES)
    return "".join(f"{line}\n" for line in lines)
