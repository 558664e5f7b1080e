"""Launch a `Kernel` as the engine does: by its launches, parameters, grids, workspaces and layouts, never by calling a function by hand."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter
from qcompile.ir.size import evaluate

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn,
    "u8": torch.uint8, "i8": torch.int8, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip
TOLERANCES = {torch.bfloat16: 1.25 * 2**-8, torch.float16: 1.25 * 2**-11, torch.float32: 1e-5}
"""Of the largest magnitude: half a unit in the last place for the result's rounding, and a quarter of that for weights or
probabilities rounded on the way, which average out over a sum; float32 sums of a few hundred numbers stay below 1e-5."""
GUARD = 64


def guarded(tensor: Tensor) -> Tensor:
    """The same tensor with 64 NaN (integers: the largest number) before and after it: a stray read spoils the result."""
    edge = torch.iinfo(tensor.dtype).max if not tensor.is_floating_point() else torch.nan
    room = torch.full((tensor.numel() + 2 * GUARD,), edge, dtype=tensor.dtype)
    view = room[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def result(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A place for a result, filled with what no result may leave there."""
    return guarded(torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype))


def assert_guards(tensor: Tensor, name: str) -> None:
    """Nothing was written beside the tensor."""
    room = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    edges = torch.cat((room[:GUARD], room[-GUARD:]))
    intact = torch.isnan(edges) if tensor.is_floating_point() else edges == torch.iinfo(tensor.dtype).max
    assert bool(intact.all()), f"{name}: written outside its {tuple(tensor.shape)}"


_FOLDER = tempfile.TemporaryDirectory(prefix="qcompile_")


def load_source(kernel: Kernel) -> ModuleType:
    """Import a kernel's source from a file, where the interpreter looks for it; it goes with the process."""
    digest = hashlib.sha256(kernel.source.encode()).hexdigest()[:16]
    path = Path(_FOLDER.name) / f"interpreted_{digest}.py"
    path.write_text(kernel.source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size_names(operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """Every name that a parameter or a grid may use: sizes, and strides of operands."""
    names = dict(sizes)
    for name, tensor in operands.items():
        for place, stride in enumerate(tensor.stride()):
            names[f"stride:{name}:{place}"] = stride
            names[f"stride:{name}:{place - tensor.dim()}"] = stride
            names[f"broadcast:{name}:{place}"] = 0 if tensor.shape[place] == 1 else stride
    return names


def argument(parameter: Parameter, operands: Mapping[str, Tensor], names: Mapping[str, int]) -> Tensor | int:
    """The value of a parameter, once it keeps what the binary assumes of it."""
    if parameter.kind == "i32":
        number = evaluate(parameter.value, names)
        assert number % parameter.divisible_by == 0, f"{parameter.name} = {number}: not divisible by {parameter.divisible_by}"
        return number
    tensor = operands[str(parameter.value)]
    if tensor.dtype != DTYPES[parameter.dtype]:
        raise AssertionError(f"{parameter.name}: declared {parameter.dtype}, got {tensor.dtype}")
    assert tensor.data_ptr() % parameter.divisible_by == 0, f"{parameter.name}: address not divisible by {parameter.divisible_by}"
    return tensor


def workspace_dtypes(kernel: Kernel) -> dict[str, torch.dtype]:
    """What the launches take each workspace for."""
    return {str(p.value): DTYPES[p.dtype] for launch in kernel.launches for p in launch.parameters if p.kind == "pointer"}


def run_launch(module: ModuleType, launch: Launch, operands: Mapping[str, Tensor], names: Mapping[str, int]) -> None:
    """One launch over its whole grid."""
    grid = tuple(evaluate(extent, names) for extent in launch.grid)
    getattr(module, launch.function)[grid](*(argument(parameter, operands, names) for parameter in launch.parameters))


def run_kernel(spec: KernelSpec, operands: dict[str, Tensor], sizes: Mapping[str, int], arch: str = "sm90") -> Kernel:
    """Emit and launch a specification; results are written into `operands`."""
    kernel = TritonBackend(arch).emit(spec)
    operands = dict(operands)
    for name, layout in kernel.layouts:
        operands[name] = guarded(apply_layout(layout, operands[name]))
    names = size_names(operands, sizes)
    kinds = workspace_dtypes(kernel)
    for space in kernel.workspaces:
        count = evaluate(space.bytes, names) // kinds[space.name].itemsize
        operands[space.name] = (
            result((count,), kinds[space.name])
            if kinds[space.name].is_floating_point
            else guarded(torch.zeros(count, dtype=kinds[space.name]))
        )
    module = load_source(kernel)
    for launch in kernel.launches:
        run_launch(module, launch, operands, names)
    for name, tensor in operands.items():
        assert_guards(tensor, name)
    return kernel


def assert_close(got: Tensor, expected: Tensor, *, tolerance: float | None = None) -> None:
    """Largest error relative to the largest magnitude, within what the result's type allows."""
    limit = TOLERANCES[got.dtype] if tolerance is None else tolerance
    assert got.shape == expected.shape
    assert bool(torch.isfinite(got.double()).all()), "a result is not finite: something was read or left outside"
    largest = float(expected.double().abs().max())
    error = float((got.double() - expected.double()).abs().max())
    assert error <= limit * max(largest, 1e-30), f"error {error:.3g} of {largest:.3g}: expected at most {limit:.3g} of it"
