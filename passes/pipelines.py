"""The ordered list of passes, with the reason for each place."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.errors import PipelineError
from qcompile.passes.base import Pass, parse_pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.plan_memory import PlanMemory
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.passes.rewrite_kv_cache import RewriteKvCache
from qcompile.quant.scheme import dtype_name
from qcompile.target import Target

RECIPES = ("nearest",)


def default_pipeline(target: Target, recipe: str = "nearest") -> list[Pass]:
    """The passes for `target`, in order.

    Raises:
        PipelineError: for an unknown recipe, listing the known ones.
    """
    if recipe not in RECIPES:
        raise PipelineError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    return [
        Canonicalize(),  # first: every later pass may count on one spelling
        RaisePatterns(),  # before folding: frequencies of rotary positions are recognised as they are stored
        FoldConstants(),  # after raising: what is left of constant arithmetic has no meaning of its own
        RemoveDeadCode(),  # masks and positions that raising made superfluous
        RewriteKvCache(),  # on float32 values: the one place where inputs change
        ConvertDtype(to=dtype_name(target.compute)),  # before rounding, so that dequantize yields the computation dtype
        QuantizeWeights(rounding=recipe),  # rounds from the checkpoint's own values: casts at the end of a log are undone
        FuseDequantize(),  # right after: each reader takes codes or is noted
        FuseResidualNorm(),  # late: earlier passes look for plain norms and adds
        RemoveDeadCode(),  # weights whose codes took their place
        LowerToKernels(),  # chooses a kernel, or the reference, for each operator
        PlanMemory(),  # last: buffers live exactly as long as the final order of nodes says
    ]


def registry() -> dict[str, type[Pass]]:
    """Every pass by name, in pipeline order."""
    passes = (
        Canonicalize, RaisePatterns, FoldConstants, RemoveDeadCode, RewriteKvCache, ConvertDtype, QuantizeWeights, FuseDequantize,
        FuseResidualNorm, LowerToKernels, PlanMemory,
    )  # fmt: skip
    return {item.name: item for item in passes}


def choose_passes(target: Target, recipe: str, passes: str | Sequence[Pass] | None, disabled: Sequence[str] = ()) -> list[Pass]:
    """The pipeline a user asked for: the default, a text, or a list, without the disabled passes.

    Raises:
        PipelineError: for text that does not parse, or a disabled pass that does not exist.
    """
    if passes is None:
        chosen = default_pipeline(target, recipe)
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
