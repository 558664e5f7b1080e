"""The whole source of an artifact: what kernels stand on, each kernel once, and one function for each run of native steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qcompile.codegen.cpp.repeats import Item, Repeat, find_repeats
from qcompile.codegen.cpp.source import Lines, block, function, joined, unique, when
from qcompile.ir.lowered import Entry, Kernel, Plan
from qcompile.ir.memory import phases
from qcompile.ir.native import NativeCall, Segment, bucket_conditions, native_kernels, plan_digest, segments

SUPPORT = ("support.h", "team.h", "layouts.h")
"""What comes first in the source."""
HEAD = """\
// {title}
//
// Made by qcompile. Each kernel is one function that every thread of a team calls; `qcompile_ENTRY_NUMBER` at the end calls them in
// the order of the plan, over a table of tensors that the engine fills once; threads wait for each other where a step reads what
// one before it wrote. `qcompile_plan` says which plan that is.
"""


def library_source(plan: Plan, kernels: Mapping[str, Kernel], title: str, lines: Mapping[str, str] | None = None) -> str:
    """The C++ of a plan's native kernels and entries.

    Args:
        plan: as it was lowered.
        kernels: by name; those of other languages are left out.
        title: the first line's comment.
        lines: node -> where it stands in the model's source.
    """
    runs = [(entry, run) for entry in plan.entries.values() for run in segments(entry, kernels)]
    entries = [part for entry, run in runs for part in entry_function(entry, run, lines or {})]
    digest = plan_digest(plan, kernels)
    ending = function('extern "C" const char* qcompile_plan', [], "The plan that this library was made for.", [f'return "{digest}";'])
    return _whole(title, [kernel for _, kernel in native_kernels(kernels)], [*entries, ending])


def kernels_source(kernels: Iterable[Kernel], title: str) -> str:
    """The C++ of kernels by themselves, for tests and measurements: `qcompile_NAME` calls one with its operands in order."""
    made, exported = list(kernels), []
    for kernel in made:
        given = ", ".join(["team", *(f"t[{place}]" for place in range(len(kernel.launches[0].parameters)))])
        exported.append(function(f"static void call_{kernel.name}", _STEPS, f"{kernel.name} over a table.", [f"{kernel.name}({given});"]))
        exported.append(_exported(f"qcompile_{kernel.name}", f"call_{kernel.name}"))
    return _whole(title, made, exported)


def _whole(title: str, kernels: Iterable[Kernel], functions: Iterable[Lines]) -> str:
    shared = unique(kernel.source for kernel in kernels)
    headers = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SUPPORT]
    parts = [HEAD.format(title=title), *headers, *(f"{text}\n" for text in shared)]
    return "\n".join([*parts, joined(functions)])


_STEPS = ("const Team& team", "const Tensor* t")


def _exported(name: str, steps: str) -> Lines:
    """What the engine calls: `steps` on every thread."""
    head = f'extern "C" void {name}'
    return function(head, ["const Tensor* tensors", "int64_t threads"], f"All of {steps}.", [f"run(threads, {steps}, tensors);"])


def entry_function(entry: Entry, segment: Segment, lines: Mapping[str, str]) -> list[Lines]:
    """The steps of a run as every thread makes them, those of its layers as functions before them; last what the engine calls."""
    name, body, layers = segment.function.removeprefix("qcompile_"), Lines(), list[Lines]()
    waits = _waits(entry, segment)
    items = [_item(call, wait) for call, wait in zip(segment.calls, waits, strict=True)]
    for repeat in find_repeats(items):
        last = repeat.first + repeat.length
        steps = [*zip(segment.calls[repeat.first : last], waits[repeat.first : last], strict=True)]
        if repeat.count == 1:
            body += _steps_of(entry, steps, lines, lambda number: f"t[{number}]")
            continue
        function_name = f"{name}_layer" if not layers else f"{name}_layer_{len(layers)}"
        layers.append(_layer(function_name, entry, repeat, steps, lines))
        body += _loop(function_name, repeat)
    first, last = segment.places[0], segment.places[-1]
    comment = f"{entry.name}: steps {first} to {last} of {len(entry.steps)}, over {len(segment.table)} tensors."
    return [*layers, function(f"static void {name}", _STEPS, comment, body), _exported(segment.function, name)]


def _waits(entry: Entry, segment: Segment) -> list[bool]:
    """Whether threads wait behind each call; behind the last one all are waited for anyway."""
    places = phases(entry)
    following = zip(segment.calls, segment.calls[1:], strict=False)
    return [*(places[call.place] != places[other.place] for call, other in following), False]


def _item(call: NativeCall, wait: bool) -> Item:
    return Item((tuple(sorted(call.kernels.items())), call.counted, wait), call.tensors)


def _layer(name: str, entry: Entry, repeat: Repeat, steps: Sequence[tuple[NativeCall, bool]], lines: Mapping[str, str]) -> Lines:
    """Steps that are made several times: `t` has what all have in common, `own` what is another one's each time."""
    base = min(repeat.moving)
    body = _steps_of(entry, steps, lines, lambda number: f"own[{number - base}]" if number in repeat.moving else f"t[{number}]")
    first, last = steps[0][0].place, steps[-1][0].place
    comment = f"{entry.name}: steps {first} to {last}, made {repeat.count} times; those of the first time are named."
    return function(f"static void {name}", [*_STEPS, "const Tensor* own"], comment, body)


def _loop(name: str, repeat: Repeat) -> Lines:
    own = f"t + {min(repeat.moving)} + layer * {repeat.stride}"
    return block(f"for (int64_t layer = 0; layer < {repeat.count}; layer++)", [f"{name}(team, t, {own});"])


def _steps_of(
    entry: Entry, steps: Iterable[tuple[NativeCall, bool]], lines: Mapping[str, str], tensor: Callable[[int], str]
) -> Lines:  # fmt: skip
    """Calls and the waits behind them; `tensor` writes one of the table."""
    return [line for call, wait in steps for line in [*_call(entry, call, lines, tensor), *when(wait, ["team.wait();"])]]


def _call(entry: Entry, call: NativeCall, lines: Mapping[str, str], tensor: Callable[[int], str]) -> Lines:
    """One step."""
    step = entry.steps[call.place]
    node = step.node or step.operator
    about = "  ".join(text for text in (node, lines.get(node, "")) if text)
    given = ", ".join(["team", *map(tensor, call.tensors)])
    choices = bucket_conditions(call.kernels)
    made = [f"// {about}"]
    if len(choices) == 1:
        return [*made, f"{choices[0][1]}({given});"]
    number, axis = call.counted
    rows = tensor(call.tensors[number]) + (".rows()" if axis < 0 else f".size[{axis}]")
    for place, (most, kernel) in enumerate(choices):
        head = f"if ({rows} <= {most})" if place == 0 else f"else if ({rows} <= {most})"
        made += block("else" if place == len(choices) - 1 else head, [f"{kernel}({given});"])
    return made
