"""`qcompile bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import qcompile
from qcompile.cli.output import BytesOption, ContextOption, EngineOption, JsonOption, NativeOption, PageOption, emit
from qcompile.dump.tables import readable, value_table


def bench(
    artifact: Annotated[Path, typer.Argument(help="Directory that `qcompile compile` wrote.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
    engine: EngineOption = None,
    max_context: ContextOption = None,
    kv_bytes: BytesOption = None,
    page_tokens: PageOption = None,
    allow_native: NativeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode speed of one sequence, memory, and size of the weights."""
    from qcompile.speed import peak_memory, speed

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    model = qcompile.load(
        artifact, engine=engine, max_context=max_context, kv_bytes=kv_bytes, page_tokens=page_tokens, allow_native=allow_native
    )
    values: dict[str, Any] = {"target": str(model.target), **speed(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens)}
    values |= {"peak_memory_bytes": peak_memory(), "weight_bytes": model.weight_bytes, "bits_per_weight": model.bits_per_weight}
    emit(values, [value_table(readable(values))], as_json=as_json)
