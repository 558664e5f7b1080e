"""`qcompile compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status

import qcompile
from qcompile.cli.output import EngineOption, JsonOption, SetsOption, emit, stderr
from qcompile.dump.rows import record_row
from qcompile.dump.tables import coverage_rows, coverage_table, pass_table, readable, value_table
from qcompile.errors import ArtifactError

if TYPE_CHECKING:
    from qcompile.compiled import CompiledModel
    from qcompile.ir.graph import Graph
    from qcompile.ir.records import PassRecord


class StatusInstrument:
    """Shows which pass is running."""

    def __init__(self, status: Status) -> None:
        """Speak through `status`, which says nothing in a pipe."""
        self.status = status

    def before(self, name: str, graph: Graph) -> None:
        """Say which pass begins."""
        self.status.update(f"{name} ({len(graph.fx.nodes)} nodes)")

    def after(self, record: PassRecord, graph: Graph) -> None:
        """What follows the last pass is code generation."""
        del record, graph
        self.status.update("generating code")

    def progress(self, label: str, done: int, total: int) -> None:
        """Say how far a long pass has come."""
        self.status.update(f"{label}: {100 * done // max(total, 1)} %")


def compile_model(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id, or a .gguf or .onnx file.")],
    target: Annotated[str, typer.Option("--target", "-t", help="ARCH-SCHEME[-KV], such as cpu-int4; see `qcompile targets`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the artifact.")],
    recipe: Annotated[str, typer.Option(help="How hard to try at the same bits: best or nearest.")] = "best",
    dump: Annotated[Path | None, typer.Option(help="Directory for what every pass did, and report.html, which shows it.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the graph before and after every pass and compare.")] = False,
    group_size: Annotated[int | None, typer.Option(help="Input columns per scale; -1 is one scale per output channel.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Weights without a zero point, or with one.")] = None,
    weight_format: Annotated[str | None, typer.Option(help="A format in place of the target's, such as 'nf4 g36 sym int8'.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave weights of this name alone (re: for a pattern); repeatable.")] = None,
    head_format: Annotated[str | None, typer.Option(help="Format of the output head, such as 'int8 g32 sym fp16', or 'float'.")] = None,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="Quantize the output head as all weights.")] = False,
    quantize_embedding: Annotated[bool, typer.Option("--quantize-embedding", help="Also quantize token embeddings.")] = False,
    matmul: Annotated[
        str | None,
        typer.Option(
            help="With integer weights: exact, on floats; or fast, with activations rounded to int8, for packed caches to 16 bits."
        ),
    ] = None,
    activation_group_size: Annotated[int | None, typer.Option(help="Columns of a token per scale; -1 is the whole token.")] = None,
    activation_symmetric: Annotated[
        bool | None,
        typer.Option("--activation-symmetric/--activation-asymmetric", help="Activations without a zero point, or with one."),
    ] = None,
    activation_static: Annotated[
        bool | None,
        typer.Option("--activation-static/--activation-dynamic", help="One scale for all tokens, from calibration data, or each its own."),
    ] = None,
    activation_clip: Annotated[float | None, typer.Option(help="Share of the range of activations that is kept, at most 1.")] = None,
    cache_keys: Annotated[str | None, typer.Option(help="Format of keys in a packed cache, such as 'int4 t32 asym'.")] = None,
    cache_values: Annotated[str | None, typer.Option(help="Format of values in a packed cache, such as 'int4 g64 asym'.")] = None,
    cache_sinks: Annotated[int | None, typer.Option(help="Tokens at the start of a sequence that stay in 16 bits.")] = None,
    cache_window: Annotated[int | None, typer.Option(help="Tokens at its end that do, at least.")] = None,
    cache_bits: Annotated[float | None, typer.Option(help="Bits of a cached number on average; each layer gets forms of its own.")] = None,
    cache_before_positions: Annotated[
        bool | None,
        typer.Option("--cache-before-positions/--cache-after-positions", help="Keys as they are before rotary positions, or after."),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Token ids (.npy), text (.txt) to calibrate on; default: packaged text.")] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(min=1, help="Windows of calibration data used at most.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a calibration window at most.")] = None,
    disable_pass: Annotated[list[str] | None, typer.Option(help="Leave a pass out; repeatable.")] = None,
    passes: Annotated[str | None, typer.Option(help="A pipeline, such as `canonicalize,raise-patterns`, in place of the default.")] = None,
    engine: EngineOption = None,
    instruction_sets: SetsOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an operator is left alone, or a kernel refused or not built.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing artifact.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")] = False,
    max_batch: Annotated[int, typer.Option(help="Sequences that plans and caches are made for.")] = 1,
    max_context: Annotated[int | None, typer.Option(help="Tokens per sequence that the cache holds.")] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that are read at once at most.")] = 512,
    as_json: JsonOption = False,
) -> None:
    """Compile MODEL for a target into a self-contained artifact."""
    if out.exists() and not overwrite:
        # Said before the work, not after it; `save` checks again.
        raise ArtifactError(f"{out}: expected a directory that does not exist yet; choose another, or replace it with --overwrite")
    console = stderr()
    # A status in a pipe would print one line; quiet there.
    console.quiet = not console.is_terminal
    with console.status(f"reading {model}") as status:
        compiled = qcompile.compile(
            model, target, recipe=recipe, passes=passes, disable=disable_pass or (), strict=strict, dump=dump, check=check or None,
            group_size=group_size, symmetric=symmetric, weight_format=weight_format, ignore=ignore, head_format=head_format,
            quantize_head=quantize_head or None, quantize_embedding=quantize_embedding or None, matmul=matmul,
            activation_group_size=activation_group_size, activation_symmetric=activation_symmetric, activation_static=activation_static,
            activation_clip=activation_clip, cache_keys=cache_keys, cache_values=cache_values, cache_sinks=cache_sinks,
            cache_window=cache_window, cache_before_positions=cache_before_positions, cache_bits=cache_bits,
            calibration=None if calibration is None else Path(calibration),
            num_calibration_samples=num_calibration_samples, max_seq_length=max_seq_length, max_batch=max_batch, max_context=max_context,
            prefill_chunk=prefill_chunk, revision=revision, trust_remote_code=trust_remote_code, engine=engine,
            instruction_sets=instruction_sets, instruments=[StatusInstrument(status)],
        )  # fmt: skip
        status.update(f"writing {out}")
        compiled.save(out, overwrite=overwrite)
    summary = {"artifact": str(out), **sizes(compiled)}
    tables = [pass_table(compiled.records), coverage_table(compiled.coverage), value_table(readable(summary))]
    emit({**summary, **details(compiled)}, tables, as_json=as_json)


def sizes(compiled: CompiledModel) -> dict[str, Any]:
    """Target and sizes, as JSON values."""
    return {
        "target": str(compiled.target),
        "weight_bytes": compiled.weight_bytes,
        "bits_per_weight": compiled.bits_per_weight,
        "matmul": compiled.matmul,
    }


def details(compiled: CompiledModel) -> dict[str, Any]:
    """Passes and coverage, as JSON values."""
    return {"passes": [record_row(record) for record in compiled.records], "coverage": coverage_rows(compiled.coverage)}
