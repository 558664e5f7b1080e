"""compile(): front end, pipeline, code generation, one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

from qcompile import frontend
from qcompile.codegen.select import backend_for
from qcompile.compiled import CompiledModel, onnx_exporter
from qcompile.errors import CapacityError, CoverageError
from qcompile.ir.lowered import Instrument
from qcompile.ir.records import CoverageRow, Settings
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import choose_passes, pipeline_text
from qcompile.passes.reproducer import reproducers_directory
from qcompile.passes.work import WorkStore, program_key
from qcompile.progress import Report, terminal_progress
from qcompile.quant.scheme import QuantScheme
from qcompile.quant.scheme_json import scheme_to_json
from qcompile.quant.scheme_options import SchemeOptions
from qcompile.rebuild import built_or_torch, named_sets, tell_of_missing
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines import require_known
from qcompile.runtime.native.processor import best_library
from qcompile.target import Target, parse_target, resolve

DEFAULT_CONTEXT = 2048


def compile(  # noqa: A001  the name is the product's
    model: Any,
    target: str | Target,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    scheme: QuantScheme | None = None,
    recipe: str = "best",
    passes: str | Sequence[Pass] | None = None,
    disable: Sequence[str] = (),
    strict: bool = False,
    dump: str | os.PathLike[str] | None = None,
    check: bool | None = None,
    calibration: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
    max_batch: int = 1,
    max_context: int | None = None,
    prefill_chunk: int = 512,
    kv_bytes: int | None = None,
    page_tokens: int | None = None,
    fuel: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    engine: str | None = None,
    instruction_sets: str | Sequence[str] | None = None,
    instruments: Sequence[Instrument] = (),
    **options: Unpack[SchemeOptions],
) -> CompiledModel:
    """Compile a model for a target.

    Args:
        model: an nn.Module, a Hugging Face causal LM (module, directory or hub id), an ExportedProgram, or the path of a `.gguf` or
            `.onnx` file.
        target: `ARCH-SCHEME[-KV]`, such as `cpu-int4` or `sm90-bf16`; `qcompile targets` lists them.
        example_inputs: what a plain module is traced with: a tensor, a tuple, or a mapping of keyword arguments.
        dynamic_shapes: as in `torch.export.export`; by default the batch dimension is symbolic.
        scheme: a QuantScheme in place of the target's preset.
        recipe: how hard to try at the same bits; `best` is the most accurate pipeline there is for the scheme, on calibration data
            where there is any; `nearest` rounds to nearest, at once.
        passes: a pipeline as text or a list of passes in place of the default.
        disable: names of passes to leave out.
        strict: make an operator that had to be left alone, a refused kernel, or C++ that cannot be compiled, an error.
        dump: a directory for what every pass did, and `report.html`, which shows it (environment: QCOMPILE_DUMP).
        check: run the graph before and after every pass and compare (environment: QCOMPILE_CHECK=1); what a pass did wrong is left as a
            file for `qcompile replay`, in `dump`/reproducers or else QCOMPILE_CACHE/reproducers.
        calibration: what recipes that need data run the model on: token ids [windows, length] (an array or the path of a .npy file),
            text or the path of a .txt file, or an iterable of inputs that a plain module is called with; by default packaged text.
        num_calibration_samples: windows or inputs used at most; by default all of an array, 64 of anything else.
        max_seq_length: tokens of a window at most; by default those of an array, 512 of text.
        max_batch: sequences that plans and caches are made for.
        max_context: tokens per sequence that the cache holds; by default what the model was made for, at most 2048.
        prefill_chunk: tokens of a prompt that are read at once at most; the memory of intermediates grows with it.
        kv_bytes: size of the cache in bytes, page tables included, whose pages sequences of any lengths share.
        page_tokens: tokens of a page of the cache, rounded up to whole groups of its format.
        fuel: stop after this many rewrites, to find a wrong one by bisection.
        revision: of a hub id.
        trust_remote_code: run code that comes with a checkpoint; never implicit.
        engine: what runs the model, in place of the target's own. `cpu-*` gets C++ kernels (`native`) where there is a compiler;
            `torch_cpu` goes without them, and builds nothing. `native` makes them for `reference-*` too.
        instruction_sets: what libraries of C++ kernels are built for, as names or a text with commas: `avx512`, `avx2`, `portable`, by
            default each that this machine's compiler knows, so that the artifact can be shipped; `here` is the best one that this
            processor has, which is built in a third of the time.
        instruments: further hooks before and after each pass.
        **options: what to change in the scheme (`qcompile.quant.scheme_options.SchemeOptions`). Of weights:

            - `weight_format`: text in place of the scheme's format, such as `nf4 g36 sym int8`;
            - `group_size`: input columns per scale; -1 is one scale per output channel;
            - `symmetric`: whether they have no zero point;
            - `ignore`: which to leave alone: names, or `re:` and an expression; first match wins;
            - `head_format`: text in place of the format of the output head, and of the embedding where that is the same matrix;
              `float` leaves them as they are. On CPUs, beside integer weights, it is `int8 g32 sym fp16`;
            - `quantize_head`, `quantize_embedding`: whether they are quantized as all weights are.

            Of products with integer weights in schemes that leave activations alone:

            - `matmul`: `exact` multiplies with float activations; `fast` rounds these to int8 on the way, each group of columns by itself.

            Of activations, in schemes that quantize them (`w8a8`, `w4a8`, `w4a4`, `fp8`):

            - `activation_group_size`: columns of a token that share a scale; -1 is the whole token;
            - `activation_symmetric`: whether they have no zero point;
            - `activation_static`: one scale for the whole tensor, measured on calibration data, in place of one per token or group;
            - `activation_clip`: the share of the range, above 0 and at most 1, that is kept; what is beyond saturates.

            Of caches that are packed (`kv8`, `kv4` and others):

            - `cache_keys`, `cache_values`: text in place of the format, such as `int4 g64 asym`, or per channel `int4 t32 asym`;
            - `cache_sinks`: how many tokens at the start of a sequence stay in 16 bits;
            - `cache_window`: how many of the last tokens do, at least.
            - `cache_before_positions`: whether keys are kept as they are before rotary positions, which are then applied on reading.
            - `cache_bits`: bits of a number in the pages on average, which `assign-kv-formats` shares among the layers.

    Returns:
        The compiled model, ready to run on this machine and to be saved.

    Raises:
        QCompileError: one subclass per kind of mistake (`qcompile.errors`); nothing is half-written.
    """
    goal = goal_of(target, scheme, options)
    require_known(engine)
    if prefill_chunk < 1:
        raise CapacityError(f"prefill_chunk={prefill_chunk}: expected at least one token; leave it out for 512")
    choose_passes(goal, recipe, passes, disable)  # a wrong pipeline is an error before a model is read
    backend, sets = backend_for(goal, engine), named_sets(instruction_sets)
    exporter = onnx_exporter(f"target {goal}") if goal.is_onnx else None
    loaded = frontend.load(
        model, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, revision=revision, trust_remote_code=trust_remote_code
    )
    data = make_calibration(calibration, loaded.assets, num_calibration_samples=num_calibration_samples, max_seq_length=max_seq_length)
    pipeline = choose_passes(goal, recipe, passes, disable, calibrated=is_calibrated(loaded, given=calibration is not None))
    context = max_context or min(loaded.assets.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    ctx = PassContext(goal, backend, max_batch, context, min(context, prefill_chunk), fuel, calibration=data, work=WorkStore(program_key()))
    text = pipeline_text(pipeline)
    directory = dump or os.environ.get("QCOMPILE_DUMP")
    writer = _dump_instruments(directory, model=loaded.assets.name, target=str(goal), pipeline=text)
    wants_check = check if check is not None else os.environ.get("QCOMPILE_CHECK") == "1"
    watch = NumericCheck(reproducers=Path(directory) / "reproducers" if directory else reproducers_directory()) if wants_check else None
    with _progress(instruments) as ctx.report:
        records = run_pipeline(loaded.graph, pipeline, ctx, [*instruments, *writer], watch)
    tell_of_missing(ctx)
    if strict:
        require_coverage(ctx.coverage)
    if exporter is not None:
        exporter.require_exportable(loaded.graph)
    kernels, binaries = built_or_torch(loaded.graph, ctx, sets, strict=strict, failed_in=directory)
    contents = ArtifactContents(
        graph=loaded.graph, plan=ctx.products["plan"], kernels=kernels, binaries=binaries, assets=loaded.assets, target=str(goal),
        pipeline=text, records=records, coverage=ctx.coverage,
        settings=Settings(scheme_to_json(goal.scheme), data.record, made_for(ctx, engine)),
    )  # fmt: skip
    for instrument in writer:
        instrument.finish(contents, ctx.notes, {**ctx.products.get("kernels", {}), **kernels})
    most = max_context if kv_bytes is not None else context
    served = None if engine == "native" and best_library(binaries) is None else engine
    return CompiledModel(contents, max_batch=max_batch, max_context=most, kv_bytes=kv_bytes, page_tokens=page_tokens, engine=served)


def made_for(ctx: PassContext, engine: str | None) -> str | None:
    """What an artifact remembers of its engine: that it was lowered for C++, or what was chosen in place of that for a CPU."""
    native = ctx.backend is not None and ctx.backend.name == "native"
    return "native" if native else engine if ctx.target.arch == "cpu" and engine != "native" else None


def is_calibrated(loaded: frontend.Loaded, *, given: bool) -> bool:
    """Whether there is data to run the model on: the caller's, or text that its own tokenizer reads."""
    return given or (loaded.graph.interface.kind == "causal_lm" and "tokenizer.json" in loaded.assets.files)


def goal_of(target: str | Target, scheme: QuantScheme | None, options: SchemeOptions) -> Target:
    """The target with the caller's scheme and options in it."""
    goal = parse_target(target)
    chosen = (scheme or goal.scheme).with_options(**options)
    return resolve(goal.arch, chosen)


def require_coverage(rows: Sequence[CoverageRow]) -> None:
    """What `strict=True` asks: no operator left alone but by choice, no kernel refused.

    Raises:
        CoverageError: listing up to ten nodes with their reasons.
    """
    left = [row for row in rows if row.reason and not row.chosen]
    if left:
        lines = "\n".join(f"  {row.node} ({row.source}): {row.operator} {row.weight}: {row.reason}" for row in left[:10])
        more = f"\n  and {len(left) - 10} more" if len(left) > 10 else ""
        raise CoverageError(
            f"strict: expected a kernel for every operator, got {len(left)} left alone:\n{lines}{more}\ncompile with "
            "strict=False, or name them in ignore="
        )


def _progress(instruments: Sequence[Instrument]) -> AbstractContextManager[Report]:
    """Where long passes report to: an instrument that has a method `progress`, or the terminal."""
    listening: list[Report] = [item.progress for item in instruments if hasattr(item, "progress")]
    return nullcontext(listening[0]) if listening else terminal_progress()


def _dump_instruments(directory: str | os.PathLike[str] | None, *, model: str, target: str, pipeline: str) -> list[Any]:
    if not directory:
        return []
    from qcompile.dump.instrument import DumpInstrument

    return [DumpInstrument(Path(directory), model=model, target=target, pipeline=pipeline)]
