"""Build a specification for the GPU at hand and launch it as the engine does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import KernelSpec
from qcompile.ir.size import evaluate
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.launch import FrozenLaunch
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.operands import Operand


def run_on_gpu(spec: KernelSpec, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Build, load and launch over operands on the GPU; results are written into these."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm{major}{minor}"
    (kernel,), binaries = build_kernels([TritonBackend(arch).emit(spec)], arch, cache=kernel_cache())
    driver = Driver()
    driver.make_current()
    layouts = dict(kernel.layouts)
    laid = {name: apply_layout(layouts[name], value) if name in layouts else value for name, value in operands.items()}
    places = {name: Operand.of(value) for name, value in laid.items()}
    for space in kernel.workspaces:
        places[space.name] = Operand.workspace(torch.empty(evaluate(space.bytes, sizes), dtype=torch.uint8, device="cuda"))
    modules = Modules(driver, {kernel.name: kernel}, binaries)
    stream = torch.cuda.current_stream().cuda_stream
    for launch in kernel.launches:
        FrozenLaunch(driver, modules.function(kernel, launch), kernel.name, launch, places, sizes, stream)()
    torch.cuda.synchronize()


def run_from_cpu(spec: KernelSpec, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """The same over operands on the CPU, which are copied there with their strides, and back."""
    device = {name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda") for name, value in operands.items()}
    for name, value in operands.items():
        device[name].copy_(value)
    run_on_gpu(spec, device, sizes)
    for name, value in operands.items():
        value.copy_(device[name])
