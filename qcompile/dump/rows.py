"""Records of passes as JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompile.ir.records import PassRecord

MEASURED = ("max_error", "sqnr_db", "kl", "total_sqnr_db", "total_kl")
"""What the numeric check adds to a record; null where it does not apply."""


def listing_name(record: PassRecord) -> str:
    """`NNN_pass-name`; NNN counts from 001, after the input."""
    return f"{record.index + 1:03d}_{record.name}"


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
        "listing": f"{listing_name(record)}.txt" if record.changed else None,
    }


def record_of(row: Mapping[str, Any]) -> PassRecord:
    """The record that `record_row` made a row of."""
    return PassRecord(
        row["index"], row["name"], row["spec"], row["changed"], row["nodes_before"], row["nodes_after"], row["seconds"],
        row["bytes"], exact=row.get("exact"), **{name: row.get(name) for name in MEASURED},
    )  # fmt: skip
