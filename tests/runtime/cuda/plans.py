"""Small plans by hand over the stub's toy kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompile.ir.lowered import Buffer, Entry, Kernel, KernelSpec, Launch, Parameter, Step, Workspace
from qcompile.ir.size import Size
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.graph import Queue
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.program import Arena, Constants, Context

CPU = torch.device("cpu")
BINARIES = {"toy.cubin": b"TOYCUBIN"}


def pointer(name: str, dtype: str = "fp32", divisible_by: int = 16) -> Parameter:
    """A pointer parameter to the operand of its name."""
    return Parameter(name, "pointer", name, dtype, divisible_by)


def integer(name: str, value: Size, divisible_by: int = 1) -> Parameter:
    """A 32-bit parameter."""
    return Parameter(name, "i32", value, "i32", divisible_by)


def kernel(
    name: str, operator: str, *launches: Launch, workspaces: tuple[Workspace, ...] = (), layouts: tuple[tuple[str, str], ...] = ()
) -> Kernel:
    """A kernel whose launches come from the toy binary."""
    return Kernel(name, KernelSpec(operator, (), ()), "", launches, workspaces, layouts)


def launch(function: str, *parameters: Parameter, grid: tuple[Size, Size, Size] = (1, 1, 1)) -> Launch:
    """A launch of a function of the toy binary."""
    return Launch(function, grid, parameters, binary="toy.cubin")


COUNT: Size = ("mul", "rows", 4)
ADD = kernel("add", "add", launch("add_f32", pointer("x"), pointer("y"), pointer("out"), integer("n", COUNT), grid=("rows", 1, 1)))
CLONE = kernel(
    "clone",
    "clone",
    launch("accumulate_f32", pointer("x"), pointer("partial"), integer("n", COUNT)),
    launch("finish_f32", pointer("partial"), pointer("out"), integer("n", COUNT)),
    workspaces=(Workspace("partial", ("mul", COUNT, 4), zeroed=True),),
)


def buffer(name: str, kind: str, shape: tuple[Size, ...] = ("batch", "sequence", 4), dtype: str = "fp32", **more: object) -> Buffer:
    """A buffer, [batch, sequence, 4] by default."""
    return Buffer(name, dtype, shape, kind, **more)  # type: ignore[arg-type]


def step(operator: str, *args: object, out: str | tuple[str, ...] = (), kernels: dict[str, str] | None = None, node: str = "") -> Step:
    """A step; a string argument refers to the buffer of that name."""
    bound = tuple({"buffer": value} if isinstance(value, str) else value for value in args)
    return Step(operator, bound, {}, (out,) if isinstance(out, str) else out, kernels or {}, node or operator)


def entry(buffers: list[Buffer], steps: list[Step], outputs: tuple[str, ...], name: str = "decode") -> Entry:
    """An entry whose inputs and states are those buffers of that kind."""
    inputs = tuple(item.name for item in buffers if item.kind in ("input", "state"))
    return Entry(name, inputs, outputs, {item.name: item for item in buffers}, tuple(steps), {})


def context(
    driver: Driver,
    kernels: Mapping[str, Kernel],
    constants: Mapping[str, Tensor] | None = None,
    binaries: Mapping[str, bytes] | None = None,
) -> tuple[Context, Queue]:
    """What programs need, over the stub, with CPU tensors as device memory."""
    queue = Queue(driver, CPU)
    modules = Modules(driver, kernels, BINARIES if binaries is None else binaries)
    return Context(driver, CPU, queue.handle, modules, Constants(dict(constants or {}).__getitem__, CPU), Arena(CPU), Arena(CPU)), queue
