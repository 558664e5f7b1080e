"""`qcompile eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import qcompile
from qcompile.cli.output import EngineOption, JsonOption, NativeOption, emit, progress_bar
from qcompile.dump.tables import value_table
from qcompile.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

    from qcompile.compiled import CompiledModel


def evaluate_artifact(
    artifact: Annotated[Path, typer.Argument(help="Directory that `qcompile compile` wrote.")],
    tokens: Annotated[Path | None, typer.Option(help="Integer array [windows, length] as .npy; default: the packaged text.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model or artifact to compare with; a model is compiled to cpu-fp32 first.")] = None,
    engine: EngineOption = None,
    allow_native: NativeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of an artifact and, given a reference, its KL divergence from it and how often both agree on the next token."""
    from qcompile.evaluation import evaluate, logits_of

    model = qcompile.load(artifact, engine=engine, allow_native=allow_native)
    windows = read_tokens(tokens, model)
    other = None if reference is None else logits_of(open_reference(reference))
    with progress_bar("evaluating") as progress:
        result = evaluate(logits_of(model), windows, other, progress=progress)
    emit(result.to_dict(), [value_table(result.to_dict())], as_json=as_json)


def read_tokens(path: Path | None, model: CompiledModel) -> Tensor:
    """The windows of a .npy file, or of the packaged evaluation text through the artifact's tokenizer: int64 [windows, length].

    Raises:
        SourceError: if the file cannot be read as an array without unpickling.
        TokenizerError: if no file is given and the artifact has no tokenizer.
    """
    import numpy as np
    import torch

    if path is None:
        from qcompile.evaluation import packaged_tokens, tokenizer_of

        return packaged_tokens(tokenizer_of(model.assets), "evaluation")
    try:
        array: Any = np.load(path, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise SourceError(f"{path}: expected an integer array [windows, length] saved by numpy.save, got {error}") from None


def open_reference(source: str) -> CompiledModel:
    """An artifact as it is; anything else compiled to `cpu-fp32` for torch, which needs no library for one evaluation."""
    if (Path(source) / "manifest.json").is_file():
        return qcompile.load(source)
    return qcompile.compile(source, "cpu-fp32", engine="torch_cpu")
