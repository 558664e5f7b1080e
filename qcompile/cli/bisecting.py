"""`qcompile bisect`."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompile.cli.importing import ImportOption, function, known_passes
from qcompile.cli.output import JsonOption, emit, stderr
from qcompile.dump.place_table import culprit_tables
from qcompile.errors import PipelineError

if TYPE_CHECKING:
    from qcompile.ir.graph import Graph
    from qcompile.passes.base import Pass, PassContext
    from qcompile.passes.bisect import Judge, Predicate

FOUND = 1


def bisect(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id, or a .gguf or .onnx file.")],
    target: Annotated[str, typer.Option("--target", "-t", help="ARCH-SCHEME[-KV], such as cpu-int4; see `qcompile targets`.")],
    predicate: Annotated[str | None, typer.Option(help="python:module:function of a graph; true while it is good.")] = None,
    command: Annotated[str | None, typer.Option(help="What to run on a file of the graph, called {}; exit code 0 means good.")] = None,
    kl_above: Annotated[float | None, typer.Option(help="Bad above this many nats per token from the input graph.")] = None,
    error_above: Annotated[float | None, typer.Option(help="Bad above this largest error, relative to the largest output.")] = None,
    fails_check: Annotated[bool, typer.Option("--fails-check", help="Bad where `compile --check` would refuse the pass.")] = False,
    recipe: Annotated[str, typer.Option(help="How hard to try at the same bits: best or nearest.")] = "best",
    passes: Annotated[str | None, typer.Option(help="A pipeline in place of the default.")] = None,
    disable_pass: Annotated[list[str] | None, typer.Option(help="Leave a pass out; repeatable.")] = None,
    modules: ImportOption = None,
    calibration: Annotated[str | None, typer.Option(help="Token ids (.npy), text (.txt) to calibrate on; default: packaged text.")] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(min=1, help="Windows of calibration data used at most.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a calibration window at most.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The first pass after which a predicate fails, and the first rewrite in it; exits with 1 if there is one, 0 if all are good."""
    from qcompile.passes.bisect import first_failing_pass

    judge = _judge(predicate, command, kl_above, error_above, fails_check=fails_check)
    with stderr().status(f"reading {model}") as status, tempfile.TemporaryDirectory() as folder:
        graph, pipeline, ctx = _prepared(
            model, target, (recipe, passes, disable_pass or (), modules), (calibration, num_calibration_samples, max_seq_length)
        )  # fmt: skip
        status.update("bisecting")
        chosen = judge if command is None else _command(command, Path(folder), ctx)
        assert chosen is not None
        culprit = first_failing_pass(graph, pipeline, ctx, chosen)
    if culprit is None:
        emit({"found": False}, [f"None of {len(pipeline)} passes is bad."], as_json=as_json)
        return
    emit({"found": True, **culprit.to_dict()}, culprit_tables(culprit), as_json=as_json)
    raise typer.Exit(FOUND)


def _judge(
    predicate: str | None, command: str | None, kl_above: float | None, error_above: float | None, *, fails_check: bool
) -> Predicate | Judge | None:
    """The one predicate that was asked for; None for a command."""
    from qcompile.passes.bisect import DivergenceAbove, ErrorAbove, FailsCheck

    asked = [predicate is not None, command is not None, kl_above is not None, error_above is not None, fails_check]
    if sum(asked) != 1:
        raise PipelineError(
            f"bisect: expected one of --predicate, --command, --kl-above, --error-above and --fails-check, got {sum(asked)} of them"
        )
    if predicate is not None:
        return function(predicate, "--predicate")
    if kl_above is not None:
        return DivergenceAbove(kl_above)
    if error_above is not None:
        return ErrorAbove(error_above)
    return FailsCheck() if fails_check else None


def _command(command: str, folder: Path, ctx: PassContext) -> Predicate:
    """A predicate that writes the graph as a reproducer (and its listing beside it, as .txt) and runs a command on that file.

    Raises:
        PipelineError: if the command does not say where the file goes, or cannot be run.
    """
    from qcompile.passes.reproducer import write_reproducer

    words = shlex.split(command)
    if not any("{}" in word for word in words):
        raise PipelineError(f"--command {command!r}: expected {{}} where the file's name belongs, got none")

    def good(graph: Graph) -> bool:
        file = folder / "graph.safetensors"
        write_reproducer(file, graph, "", ctx)
        file.with_suffix(".txt").write_text(graph.text(), encoding="utf-8")
        try:
            return subprocess.run([word.replace("{}", str(file)) for word in words], check=False, stdout=2).returncode == 0
        except OSError as error:
            raise PipelineError(f"--command {command!r}: expected a command that can be run, got {error}") from error

    return good


def _prepared(
    model: str, target: str, chosen: tuple[str, str | None, list[str] | tuple[()], list[str] | None],
    data: tuple[str | None, int | None, int | None],
) -> tuple[Graph, list[Pass], PassContext]:  # fmt: skip
    """What `qcompile compile` would run its passes on, with and for."""
    from qcompile import frontend
    from qcompile.codegen.select import backend_for
    from qcompile.compiler import DEFAULT_CONTEXT
    from qcompile.passes.base import PassContext, parse_pipeline
    from qcompile.passes.calibration import make_calibration
    from qcompile.passes.pipelines import choose_passes
    from qcompile.passes.work import WorkStore, program_key
    from qcompile.target import parse_target

    recipe, text, disabled, modules = chosen
    given, samples, length = data
    goal = parse_target(target)
    own = None if text is None else parse_pipeline(text, known_passes(modules))
    choose_passes(goal, recipe, own, disabled)  # a wrong pipeline is an error before a model is read
    loaded = frontend.load(model)
    calibration = make_calibration(
        None if given is None else Path(given), loaded.assets, num_calibration_samples=samples, max_seq_length=length
    )
    calibrated = given is not None or (loaded.graph.interface.kind == "causal_lm" and "tokenizer.json" in loaded.assets.files)
    context = min(loaded.assets.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    ctx = PassContext(goal, backend_for(goal), 1, context, min(context, 512), calibration=calibration, work=WorkStore(program_key()))
    return loaded.graph, choose_passes(goal, recipe, own, disabled, calibrated=calibrated), ctx
