"""Records of passes as JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompile.ir.records import PassRecord


def listing_name(record: PassRecord) -> str:
    """`NNN_pass-name`; NNN counts from 001, after the input."""
    return f"{record.index + 1:03d}_{record.name}"


def record_row(record: PassRecord) -> dict[str, Any]:
    """A record as JSON values; `max_error` is null where it was not checked, `listing` where nothing changed."""
    return {
        "index": record.index,
        "name": record.name,
        "spec": record.spec,
        "changed": record.changed,
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "seconds": round(record.seconds, 4),
        "max_error": record.max_error,
        "bytes": record.constant_bytes,
        "listing": f"{listing_name(record)}.txt" if record.changed else None,
    }


def record_of(row: Mapping[str, Any]) -> PassRecord:
    """The record that `record_row` made a row of."""
    return PassRecord(
        row["index"], row["name"], row["spec"], row["changed"], row["nodes_before"], row["nodes_after"], row["seconds"],
        row["bytes"], row["max_error"],
    )  # fmt: skip
