"""The ordered list of passes, with the reason for each place."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.errors import PipelineError
from qcompile.passes.assign_kv_formats import AssignKvFormats
from qcompile.passes.base import Pass, parse_pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
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


def default_pipeline(target: Target, recipe: str = "nearest", *, calibrated: bool = True) -> list[Pass]:
    """The passes for `target`, in order.

    Args:
        target: what to compile for.
        recipe: `nearest` rounds to nearest without data; `best` is the most accurate pipeline there is for the scheme.
        calibrated: whether there is data to run the model on; without it `best` does what can be done without.

    Raises:
        PipelineError: for an unknown recipe, listing the known ones.
    """
    if recipe not in RECIPES:
        raise PipelineError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    best = recipe == "best"
    return [
        Canonicalize(),  # first: every later pass may count on one spelling
        RaisePatterns(),  # before folding: frequencies of rotary positions are recognised as they are stored
        FoldConstants(),  # after raising: what is left of constant arithmetic has no meaning of its own
        RemoveDeadCode(),  # masks and positions that raising made superfluous
        FoldBatchNorms(),  # before anything looks at weights: these are the ones that will be multiplied with
        *(_change_basis(target, calibrated=calibrated) if best else ()),
        *((AssignKvFormats(),) if target.scheme.cache.bits else ()),  # in the bases that keys and values will be stored in
        RewriteKvCache(),  # on float32 values: the one place where inputs change; after the bases: keys are stored as they are then
        ConvertDtype(to=dtype_name(target.compute)),  # before rounding, so that dequantize yields the computation dtype
        *((QuantizeActivations(),) if target.scheme.activation else ()),  # before weights: these are rounded for what they will meet
        *(_round(target, calibrated=calibrated) if best else (QuantizeWeights(rounding="nearest"),)),
        FuseResidualNorm(),  # late: earlier passes look for plain norms and adds
        *((FuseQuantizeDequantize(),) if target.scheme.activation else ()),  # sums fuse with norm and quantize; takes weights first
        # After the bases, which look for appends; only GPUs have a kernel for it.
        *((FuseCacheAppend(),) if target.scheme.cache.is_packed and target.is_cuda else ()),
        FuseDequantize(),  # each other reader takes codes or is noted
        RemoveDeadCode(),  # weights whose codes took their place
        LowerToKernels(),  # chooses a kernel, or the reference, for each operator
        PlanMemory(),  # last: buffers live exactly as long as the final order of nodes says
    ]


def _change_basis(target: Target, *, calibrated: bool) -> list[Pass]:
    """Bases in which weights, activations and keys quantize well: all exact."""
    scheme = target.scheme
    packed_keys = ("keys",) if scheme.cache.is_rotated else ()
    if scheme.weight is None and scheme.activation is None:
        if scheme.cache.rematerialized:  # what is rounded is a norm's output: its gain and its outliers are the stream's
            return [FoldNorms(), RotateHadamard()]
        return [RotateHadamard(stream=False, heads=False, online=packed_keys)] if packed_keys else []
    if calibrated and (scheme.activation is not None or _is_coarse(target)):
        # Each norm's gain suits its own linears, and channels are mixed behind it: a third of the error of one rotated stream.
        grouped = scheme.activation is not None and scheme.activation.granularity.group_size != -1
        # The input of the output projection is better mixed across heads than within them, unless activations are rounded in groups.
        return [
            LearnRotation(kinds=("orthogonal",), online=True),  # to the stream's own axes, where something has hidden them
            # What batch norms left a convolution is alike already, and only its filters would suffer.
            SmoothActivations(measure="absmean", convolutions=False),
            RotateHadamard(stream=False, heads=grouped, online=("linears", *packed_keys)),
        ]
    online = ("linears", *packed_keys) if scheme.activation is not None else packed_keys
    return [
        FoldNorms(),  # gains stand in the way of rotations
        RotateHadamard(online=online),  # online only what is rounded while the model runs: inputs of linears, cached keys
    ]


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
        ConvertDtype, SplitOutliers, InsertLowRankBranch, QuantizeActivations, QuantizeWeights, FuseResidualNorm, FuseQuantizeDequantize,
        FuseCacheAppend, FuseDequantize, LowerToKernels, PlanMemory,
    )  # fmt: skip
    return {item.name: item for item in passes}


def choose_passes(
    target: Target, recipe: str, passes: str | Sequence[Pass] | None, disabled: Sequence[str] = (), *, calibrated: bool = True
) -> list[Pass]:
    """The pipeline a user asked for: the default, a text, or a list, without the disabled passes.

    Raises:
        PipelineError: for text that does not parse, or a disabled pass that does not exist.
    """
    if passes is None:
        chosen = default_pipeline(target, recipe, calibrated=calibrated)
    elif isinstance(passes, str):
        chosen = parse_pipeline(passes, registry())
    else:
        chosen = list(passes)
    names = {step.name for step in chosen}
    for name in disabled:
        if name not in names:
            raise PipelineError(f"disabled pass {name!r}: expected one of the pipeline's {', '.join(sorted(names))}")
    return [step for step in chosen if step.name not in disabled]


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
