"""Runs the pass of a reproducer again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.errors import NumericError, PassError, VerifyError
from qcompile.ir.lowered import Backend
from qcompile.ir.records import PassRecord
from qcompile.passes.base import Pass
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.locate import Place
from qcompile.passes.manager import run_pipeline
from qcompile.passes.reproducer import Reproducer


@dataclass(frozen=True)
class Replay:
    """What came of it.

    Attributes:
        records: of the passes that were run and found right.
        error: what is still wrong, "" if nothing.
        place: where, None where that is not known or nothing is wrong.
    """

    records: tuple[PassRecord, ...]
    error: str = ""
    place: Place | None = None

    @property
    def fails(self) -> bool:
        """Whether the mistake is still there."""
        return bool(self.error)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"fails": self.fails, "error": self.error, "place": None if self.place is None else self.place.to_dict()}


def replay(reproducer: Reproducer, passes: Sequence[Pass], backend: Backend | None = None) -> Replay:
    """Run `passes` on the graph of a reproducer, checked like it was.

    Raises:
        QCompileError: for what is no mistake of a pass, such as an option that does not exist.
    """
    check = NumericCheck(reproducer.tolerance)
    records: list[PassRecord] = []
    try:
        records = run_pipeline(reproducer.graph.clone(), passes, reproducer.context(backend), check=check)
    except (PassError, VerifyError) as error:
        place = error.place if isinstance(error, NumericError) else None
        return Replay(tuple(records), str(error), place if isinstance(place, Place) else None)
    return Replay(tuple(records))
