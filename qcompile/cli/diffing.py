"""`qcompile diff`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from qcompile.cli.inspecting import read_facts
from qcompile.cli.output import JsonOption, emit
from qcompile.dump.compare import Limits, compare
from qcompile.dump.compare_tables import comparison_tables
from qcompile.errors import OptionError

REGRESSION = 1


def share(text: str) -> float:
    """`2%` or `0.02` as 0.02; `off` as infinity.

    Raises:
        OptionError: for anything else, and for shares below 0.
    """
    if text == "off":
        return math.inf
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise OptionError(f"{text!r}: expected a share such as 2% or 0.02, or off")
    return value


def diff(
    before: Annotated[Path, typer.Argument(help="An artifact or a dump: what is compared with.")],
    after: Annotated[Path, typer.Argument(help="An artifact or a dump: what is judged.")],
    max_size_growth: Annotated[str, typer.Option(help="Growth of any size; off never fails.")] = "2%",
    max_error_growth: Annotated[str, typer.Option(help="Growth of a pass's error or of the KL; off never fails.")] = "10%",
    max_slowdown: Annotated[str, typer.Option(help="Loss of tokens per second; off never fails.")] = "10%",
    max_kl: Annotated[float | None, typer.Option(min=0, help="KL of AFTER in nats, whatever it was before.")] = None,
    max_left_alone: Annotated[int, typer.Option(min=0, help="Operators newly left alone and not by choice.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """What differs between two compilations; exit code 1 if AFTER is worse than the limits allow, 2 for bad input."""
    limits = Limits(
        size=share(max_size_growth), error=share(max_error_growth), speed=share(max_slowdown),
        kl=math.inf if max_kl is None else max_kl, left_alone=max_left_alone,
    )  # fmt: skip
    found = compare(read_facts(before), read_facts(after), limits)
    emit(found.to_dict(), comparison_tables(found), as_json=as_json)
    if found.regressions:
        raise typer.Exit(REGRESSION)
