"""A plan as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from qcompile.dump.cache_table import cache_tables
from qcompile.dump.tables import coverage_table, format_bytes, value_table

if TYPE_CHECKING:
    from qcompile.planning.needs import Needs
    from qcompile.planning.result import CompilationPlan
    from qcompile.planning.speed import Phase, Speed


def plan_tables(plan: CompilationPlan) -> list[Table]:
    """Passes with their reasons, formats, cache, sizes, needs, speed, and what is still open."""
    tables = [_pass_table(plan), coverage_table(plan.coverage), *cache_tables(plan.cache), _size_table(plan), _needs_table(plan.needs)]
    if plan.speed is not None:
        tables.append(_speed_table(plan.speed))
    if plan.choices or plan.notes:
        tables.append(_open_table(plan))
    return tables


def _pass_table(plan: CompilationPlan) -> Table:
    table = _table(f"{plan.model} for {plan.target}: passes (* reads weights or calibration data)", "pass", "why here")
    for header in ("nodes", "weights"):
        table.add_column(header, justify="right")
    for item in plan.passes:
        mark = " *" if item.reads_values else ""
        table.add_row(f"{item.spec}{mark}", item.reason, str(item.nodes), format_bytes(item.constant_bytes))
    return table


def _size_table(plan: CompilationPlan) -> Table:
    low, high = plan.size_range
    values: dict[str, object] = {name: format_bytes(size) for name, size in plan.size.to_dict().items() if size}
    if low != high:
        values["total, whatever is decided"] = f"{format_bytes(low)} to {format_bytes(high)}"
    values["bits per weight"] = plan.bits_per_weight if plan.bits_per_weight is not None else "-"
    values |= {f"in memory: {name.replace('_', ' ')}": format_bytes(size) for name, size in plan.memory.to_dict().items() if size}
    return value_table(values, title="the artifact, and what running it takes")


def _needs_table(needs: Needs) -> Table:
    values: dict[str, object] = {"memory: this program": format_bytes(needs.program)}
    values |= {f"memory: {name}": format_bytes(size) for name, size in needs.phases.items()}
    values["peak memory"] = format_bytes(needs.peak_memory)
    values |= {f"disk: {name}": format_bytes(size) for name, size in needs.disk.items()}
    return value_table(values, title="the compilation")


def _speed_table(speed: Speed) -> Table:
    limits = f"{speed.bandwidth / 1e9:,.0f} GB/s, {speed.compute / 1e12:,.3g} TFLOP/s, {speed.source}"
    title = f"at most, not measured: {speed.device} ({limits})"
    table = _table(title, "phase")
    for header in ("tokens/s", "read per step", "operations per step"):
        table.add_column(header, justify="right")
    table.add_column("bound by")
    sequences = f"{speed.batch} sequence{'s' if speed.batch > 1 else ''}"
    _add_phase(table, f"prefill, {sequences} of {speed.prompt} tokens", speed.prefill)
    _add_phase(table, f"decode, {sequences} at {speed.context} tokens", speed.decode)
    return table


def _add_phase(table: Table, name: str, phase: Phase) -> None:
    table.add_row(name, f"{phase.tokens_per_second:,.0f}", format_bytes(phase.read_bytes), f"{phase.operations:.3g}", phase.bound)


def _open_table(plan: CompilationPlan) -> Table:
    table = _table("open until there are weights and data", "pass", "what", "assumed")
    for choice in plan.choices:
        table.add_row(choice.step, choice.what, choice.assumed)
    for note in plan.notes:
        table.add_row("", note, "")
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
