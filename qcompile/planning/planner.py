"""plan(): what compile() would do, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from qcompile import frontend
from qcompile.codegen.select import backend_for, instead_of_native
from qcompile.compiler import DEFAULT_CONTEXT, goal_of, is_calibrated
from qcompile.errors import CapacityError
from qcompile.frontend.loaded import Loaded
from qcompile.ir.lowered import Instrument
from qcompile.ir.records import Assets, MemoryPlan
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.calibration import Calibration, make_calibration
from qcompile.passes.calibration_data import DEFAULT_LENGTH, DEFAULT_SAMPLES
from qcompile.passes.pipelines import choose_passes, place_passes
from qcompile.planning.hardware import device_for
from qcompile.planning.needs import predict_needs
from qcompile.planning.outlining import Outlined, outline_model
from qcompile.planning.result import CompilationPlan, PlannedPass
from qcompile.planning.speed import held_weight_bytes, predict_speed
from qcompile.quant.scheme import QuantScheme
from qcompile.quant.scheme_options import SchemeOptions
from qcompile.rebuild import told
from qcompile.runtime.accounting import bits_per_weight, memory_plan
from qcompile.runtime.cache_layers import cache_layers
from qcompile.runtime.cache_layout import CacheLayout, layout_of
from qcompile.runtime.engines import require_known
from qcompile.target import Target

_UNLIMITED = 1 << 40


def plan(
    model: Any,
    target: str | Target,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    scheme: QuantScheme | None = None,
    recipe: str = "best",
    passes: str | Sequence[Pass] | None = None,
    disable: Sequence[str] = (),
    calibration: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
    max_batch: int = 1,
    max_context: int | None = None,
    prefill_chunk: int = 512,
    kv_bytes: int | None = None,
    page_tokens: int | None = None,
    device: str | None = None,
    device_bandwidth: float | None = None,
    device_compute: float | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    engine: str | None = None,
    instruments: Sequence[Instrument] = (),
    **options: Unpack[SchemeOptions],
) -> CompilationPlan:
    """Say what `compile` with these arguments would do, without reading a weight: the same passes run over constants without values.

    Args:
        model: as `compile` takes it, or the path of a bare `config.json`; of a model of the hub no weights are downloaded.
        target: `ARCH-SCHEME[-KV]`.
        example_inputs: as in `compile`, like all that is not described here.
        dynamic_shapes: as there.
        scheme: as there.
        recipe: as there.
        passes: as there.
        disable: as there.
        calibration: as there; only how much there is of it counts.
        num_calibration_samples: as there.
        max_seq_length: as there.
        max_batch: sequences that caches and speeds are planned for.
        max_context: tokens per sequence in the cache, at which decoding is planned.
        prefill_chunk: as in `compile`.
        kv_bytes: as there.
        page_tokens: as there.
        device: what speeds are planned for, such as `H200`; by default the first of its architecture (`qcompile.planning.hardware`), or
            this machine's CPU, measured in passing.
        device_bandwidth: bytes a second that it reads from memory, in place of the data sheet's.
        device_compute: operations a second, in place of the data sheet's.
        revision: as in `compile`.
        trust_remote_code: as there.
        engine: as there.
        instruments: as there.
        **options: what to change in the scheme, as there.

    Returns:
        The plan: passes, formats, what is left alone and why, sizes, needs of the compilation, and bounds of speed.

    Raises:
        QCompileError: as `compile` would, for what can be seen without weights; `OptionError` for a device that is not known.
    """
    goal = goal_of(target, scheme, options)
    if prefill_chunk < 1:
        raise CapacityError(f"prefill_chunk={prefill_chunk}: expected at least one token; leave it out for 512")
    require_known(engine)
    choose_passes(goal, recipe, passes, disable)
    runs_on = device_for(goal, device, device_bandwidth, device_compute)
    loaded = frontend.load(
        model, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, revision=revision, trust_remote_code=trust_remote_code,
        weights=False,
    )  # fmt: skip
    data = make_calibration(calibration, loaded.assets, num_calibration_samples=num_calibration_samples, max_seq_length=max_seq_length)
    case = _Case(loaded.assets, data, calibration is not None, is_bare(loaded), is_calibrated(loaded, given=calibration is not None))
    placed = place_passes(goal, recipe, passes, disable, calibrated=case.is_calibrated)
    context = max_context or min(loaded.assets.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    ctx = PassContext(goal, backend_for(goal, engine), max_batch, context, min(context, prefill_chunk), calibration=data)
    outlined = outline_model(loaded.graph, loaded.assets, [step for step, _ in placed], ctx, instruments)
    missing = "" if ctx.backend is None else instead_of_native(ctx.backend)
    most = max_context if kv_bytes is not None else context
    layout = layout_of(
        outlined.contents.plan.entries.get("decode"), max_batch=max_batch, kv_bytes=kv_bytes, page_tokens=page_tokens,
        max_context=most or loaded.assets.max_positions or _UNLIMITED,
    )  # fmt: skip
    tokens = case.tokens(num_calibration_samples, max_seq_length)
    chosen = outlined.contents
    return CompilationPlan(
        model=loaded.assets.name or loaded.assets.model_type,
        target=str(goal),
        pipeline=chosen.pipeline,
        passes=_planned(outlined, [reason for _, reason in placed]),
        coverage=tuple(told(chosen.coverage, missing) if missing else chosen.coverage),
        cache=tuple(cache_layers(chosen.plan)),
        size=outlined.size,
        alternatives=outlined.alternatives,
        bits_per_weight=bits_per_weight(chosen.constants, chosen.plan),
        memory=_memory(outlined, layout, is_cuda=goal.is_cuda),
        needs=predict_needs(outlined, tokens),
        speed=predict_speed(chosen, layout, runs_on, is_cuda=goal.is_cuda),
        choices=tuple(outlined.outline.choices),
        notes=tuple(case.notes(outlined, goal, missing)),
    )


def is_bare(loaded: Loaded) -> bool:
    """Whether this is the configuration alone of a language model, whose checkpoint will have a tokenizer."""
    unbound = any(not constant.is_bound for constant in loaded.graph.constants.values())
    return loaded.graph.interface.kind == "causal_lm" and unbound and "tokenizer.json" not in loaded.assets.files


@dataclass(frozen=True)
class _Case:
    """Of a model that is planned, what is known of the data that it would be compiled on."""

    assets: Assets
    data: Calibration
    is_given: bool
    is_bare: bool
    has_data: bool

    @property
    def is_calibrated(self) -> bool:
        return self.has_data or self.is_bare

    def tokens(self, samples: int | None, length: int | None) -> int:
        """Of calibration data: counted where it is at hand, else as many as are taken by default."""
        if self.has_data:
            found = self.data.data
            return found.tokens.numel() if found.tokens is not None else len(found.samples)
        most = self.assets.max_positions or DEFAULT_LENGTH
        return (samples or DEFAULT_SAMPLES) * min(length or DEFAULT_LENGTH, most)

    def notes(self, outlined: Outlined, target: Target, missing: str) -> list[str]:
        """What a table does not say; `missing` is why there are no C++ kernels where there should be."""
        steps = ", ".join(outlined.outline.valueless)
        known = {
            "the configuration alone: tokenizer files come on top, and calibration text is taken to be there": self.is_bare,
            f"compile will ask for calibration=: {steps} need data, and this model brings none": bool(steps) and not self.is_calibrated,
            "binaries of kernels are estimated: nothing was built": outlined.size.binaries > 0,
            f"torch_cpu will serve in place of native kernels: {missing}": bool(missing),
            "the ONNX file is estimated: nothing was exported": target.is_onnx,
        }
        return [note for note, holds in known.items() if holds]


def _planned(outlined: Outlined, reasons: Sequence[str]) -> tuple[PlannedPass, ...]:
    reads = set(outlined.outline.valueless)
    return tuple(
        PlannedPass(record.spec, reason, record.name in reads, record.nodes_after, record.constant_bytes)
        for record, reason in zip(outlined.contents.records, reasons, strict=True)
    )


def _memory(outlined: Outlined, layout: CacheLayout, *, is_cuda: bool) -> MemoryPlan:
    """Of the engine: weights as it holds them, the cache, and the largest arena."""
    contents = outlined.contents
    arena = max((entry.arena_bytes for entry in contents.plan.entries.values()), default=0)
    return memory_plan(held_weight_bytes(contents, is_cuda=is_cuda), layout if layout.states else None, arena)
