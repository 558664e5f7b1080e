"""What runs on a GPU: a small model compiled for the one at hand; a specification that is built for it and launched as the engine does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompile import frontend
from qcompile.codegen.select import backend_for, build
from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import KernelSpec
from qcompile.ir.size import evaluate
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.launch import FrozenLaunch
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.operands import Operand
from qcompile.target import parse_target
from tests.models import tiny


def architecture_at_hand() -> str:
    """The architecture of the current device: `sm90`."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def small_llama(target: str, max_context: int) -> ArtifactContents:
    """A two-layer llama with heads of 64, its weights always the same, compiled for a target."""
    goal = parse_target(target)
    model = tiny("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=192)
    loaded = frontend.load(model)
    tokens = torch.randint(0, 100, (4, 64), generator=torch.Generator().manual_seed(1))
    calibration = make_calibration(tokens, loaded.assets)
    ctx = PassContext(goal, backend_for(goal), max_batch=4, max_context=max_context, prefill_chunk=16, calibration=calibration)
    run_pipeline(loaded.graph, default_pipeline(goal), ctx)
    kernels, binaries = build(ctx.products["kernels"], goal)
    return ArtifactContents(loaded.graph, ctx.products["plan"], kernels, binaries, loaded.assets, str(goal), "")


def run_on_gpu(spec: KernelSpec, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Build, load and launch over operands on the GPU; results are written into these."""
    arch = architecture_at_hand()
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
