"""The ordered list of passes, with the reason for each place."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.errors import PipelineError
from qcompile.passes.assign_kv_formats import AssignKvFormats
from qcompile.passes.base import Pass, parse_pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.fast_attention import FastAttention
from qcompile.passes.fast_matmuls import FastMatmuls
from qcompile.passes.fold_batch_norms import FoldBatchNorms
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.fuse_cache_append import FuseCacheAppend
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.fuse_quantize_dequantize import FuseQuantizeDequantize
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.insert_low_rank_branch import InsertLowRankBranch
from qcompile.passes.learn_rotation import LearnRotation
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.plan_memory import PlanMemory
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.passes.reorder_channels import ReorderChannels
from qcompile.passes.rewrite_kv_cache import RewriteKvCache
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.passes.scale_keys import ScaleKeys
from qcompile.passes.scale_salient_weights import ScaleSalientWeights
from qcompile.passes.smooth_activations import SmoothActivations
from qcompile.passes.split_outliers import SplitOutliers
from qcompile.quant.scheme import dtype_name
from qcompile.target import Target

RECIPES = ("best", "nearest")


Placed = tuple[Pass, str]
"""A pass and the reason for its place."""


def default_pipeline(target: Target, recipe: str = "nearest", *, calibrated: bool = True) -> list[Pass]:
    """The passes for `target`, in order; see `placed_passes`."""
    return [step for step, _ in placed_passes(target, recipe, calibrated=calibrated)]


def placed_passes(target: Target, recipe: str = "nearest", *, calibrated: bool = True) -> list[Placed]:
    """The passes for `target`, in order, each with the reason for its place.

    Args:
        target: what to compile for.
        recipe: `nearest` rounds to nearest without data; `best` is the most accurate pipeline there is for the scheme.
        calibrated: whether there is data to run the model on; without it `best` does what can be done without.

    Raises:
        PipelineError: for an unknown recipe, listing the known ones.
    """
    if recipe not in RECIPES:
        raise PipelineError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    best, scheme = recipe == "best", target.scheme
    is_rounded = scheme.activation is not None or scheme.matmul == "fast"
    round_weights = _round(target, calibrated=calibrated) if best else [QuantizeWeights(rounding="nearest")]
    wanted: list[tuple[bool, Pass, str]] = [
        (True, Canonicalize(), "first: every later pass may count on one spelling"),
        (True, RaisePatterns(), "before folding: frequencies of rotary positions are recognised as they are stored"),
        (True, FoldConstants(), "after raising: what is left of constant arithmetic has no meaning of its own"),
        (True, RemoveDeadCode(), "masks and positions that raising made superfluous"),
        (True, FoldBatchNorms(), "before anything looks at weights: these are the ones that will be multiplied with"),
        *((best, step, reason) for step, reason in _change_basis(target, calibrated=calibrated)),
        (bool(scheme.cache.bits), AssignKvFormats(), "in the bases that keys and values will be stored in"),
        (True, RewriteKvCache(), "on float32 values: the one place where inputs change; after the bases: keys are stored as they are then"),
        (True, ConvertDtype(to=dtype_name(target.compute)), "before rounding, so that dequantize yields the computation dtype"),
        (scheme.activation is not None, QuantizeActivations(), "before weights: these are rounded for what they will meet"),
        *((True, step, "on the values that will be multiplied: bases, dtype and activations are settled") for step in round_weights),
        (scheme.matmul == "fast", FastMatmuls(), "after weights: bases and rounding are those of float activations"),
        (
            scheme.matmul == "fast" and scheme.cache.is_packed and not target.is_cuda,
            FastAttention(),
            "like matmuls, and after the cache was rewritten; only CPUs have kernels for it",
        ),
        (True, FuseResidualNorm(), "late: earlier passes look for plain norms and adds"),
        (is_rounded, FuseQuantizeDequantize(), "sums fuse with norm and quantize; takes weights first"),
        (
            scheme.cache.is_packed and target.is_cuda,
            FuseCacheAppend(),
            "after the bases, which look for appends; only GPUs have a kernel for it",
        ),
        (True, FuseDequantize(), "each other reader takes codes or is noted"),
        (True, RemoveDeadCode(), "weights whose codes took their place"),
        (True, LowerToKernels(), "chooses a kernel, or the reference, for each operator"),
        (True, PlanMemory(), "last: buffers live exactly as long as the final order of nodes says"),
    ]
    return [(step, reason) for is_wanted, step, reason in wanted if is_wanted]


def _change_basis(target: Target, *, calibrated: bool) -> list[Placed]:
    """Bases in which weights, activations and keys quantize well: all exact."""
    scheme = target.scheme
    packed_keys = ("keys",) if scheme.cache.is_rotated else ()
    gains = (FoldNorms(), "gains stand in the way of rotations")
    if scheme.weight is None and scheme.activation is None:
        if scheme.cache.rematerialized:
            return [gains, (RotateHadamard(), "what is rounded is a norm's output: its gain and its outliers are the stream's")]
        keys = RotateHadamard(stream=False, heads=False, online=packed_keys)
        return [(keys, "keys alone are rounded: only they are mixed")] if packed_keys else []
    if calibrated and (scheme.activation is not None or _is_coarse(target)):
        # Each norm's gain suits its own linears, and channels are mixed behind it: a third of the error of one rotated stream.
        grouped = scheme.activation is not None and scheme.activation.granularity.group_size != -1
        return [
            (LearnRotation(kinds=("orthogonal",), online=True), "to the stream's own axes, where something has hidden them"),
            (
                SmoothActivations(measure="absmean", convolutions=False),
                "what batch norms left a convolution is alike already, and only its filters would suffer",
            ),
            (
                RotateHadamard(stream=False, heads=grouped, online=("linears", *packed_keys)),
                "the output projection's input is better mixed across heads than within them, unless activations are rounded in groups",
            ),
        ]
    online = ("linears", *packed_keys) if scheme.activation is not None else packed_keys
    rotation = RotateHadamard(online=online)
    return [gains, (rotation, "online only what is rounded while the model runs: inputs of linears, cached keys")]


def _is_coarse(target: Target) -> bool:
    """Whether weights have so few levels that rotating while the model runs is worth its time."""
    return target.scheme.weight is not None and target.scheme.weight.element.bits <= 4


def _round(target: Target, *, calibrated: bool) -> list[Pass]:
    """Weights: rounded layer by layer against what the layers before really give, then, where levels are few, tuned end to end."""
    if target.scheme.weight is None:
        return []
    sequential = "learned" if _is_coarse(target) else "gptq"
    return [QuantizeWeights(rounding=sequential if calibrated else "mse-clip")]


def registry() -> dict[str, type[Pass]]:
    """Every pass by name, in pipeline order."""
    passes = (
        Canonicalize, RaisePatterns, FoldConstants, RemoveDeadCode, FoldBatchNorms, SmoothActivations, ScaleSalientWeights, ScaleKeys,
        FoldNorms, LearnRotation, RotateHadamard, ReorderChannels, AssignKvFormats, RewriteKvCache,
        ConvertDtype, SplitOutliers, InsertLowRankBranch, QuantizeActivations, QuantizeWeights, FastMatmuls, FastAttention,
        FuseResidualNorm, FuseQuantizeDequantize, FuseCacheAppend, FuseDequantize, LowerToKernels, PlanMemory,
    )  # fmt: skip
    return {item.name: item for item in passes}


def choose_passes(
    target: Target, recipe: str, passes: str | Sequence[Pass] | None, disabled: Sequence[str] = (), *, calibrated: bool = True
) -> list[Pass]:
    """The pipeline a user asked for: the default, a text, or a list, without the disabled passes.

    Raises:
        PipelineError: for text that does not parse, or a disabled pass that does not exist.
    """
    return [step for step, _ in place_passes(target, recipe, passes, disabled, calibrated=calibrated)]


def place_passes(
    target: Target, recipe: str, passes: str | Sequence[Pass] | None, disabled: Sequence[str] = (), *, calibrated: bool = True
) -> list[Placed]:
    """As `choose_passes`, with the reason for each place; a user's own passes have none."""
    if passes is None:
        chosen = placed_passes(target, recipe, calibrated=calibrated)
    else:
        given = parse_pipeline(passes, registry()) if isinstance(passes, str) else passes
        chosen = [(step, "") for step in given]
    names = {step.name for step, _ in chosen}
    for name in disabled:
        if name not in names:
            raise PipelineError(f"disabled pass {name!r}: expected one of the pipeline's {', '.join(sorted(names))}")
    return [(step, reason) for step, reason in chosen if step.name not in disabled]


def pipeline_text(passes: Sequence[Pass]) -> str:
    """The pipeline as one line that parses back."""
    return ",".join(step.spec for step in passes)


def insert(pipeline: Sequence[Pass], new: Pass, *, before: str = "", after: str = "") -> list[Pass]:
    """A copy of `pipeline` with `new` before or after the pass of that name (the last of that name).

    Raises:
        PipelineError: if there is no such pass.
    """
    names = [step.name for step in pipeline]
    anchor = before or after
    if anchor not in names:
        raise PipelineError(f"insert {new.name}: expected one of the pipeline's passes {', '.join(names)}, got {anchor!r}")
    place = len(names) - 1 - names[::-1].index(anchor) + (0 if before else 1)
    return [*pipeline[:place], new, *pipeline[place:]]
