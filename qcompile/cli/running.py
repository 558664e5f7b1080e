"""`qcompile run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qcompile
from qcompile.cli.output import BytesOption, ContextOption, EngineOption, NativeOption, PageOption


def run(
    artifact: Annotated[Path, typer.Argument(help="Directory that `qcompile compile` wrote.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; with --chat, what the user says.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    count: Annotated[int, typer.Option("-n", "--max-new-tokens", help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0 among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens of this probability in sum.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the most likely one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make tokens that have occurred less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="For the same samples again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    engine: EngineOption = None,
    max_context: ContextOption = None,
    kv_bytes: BytesOption = None,
    page_tokens: PageOption = None,
    allow_native: NativeOption = False,
) -> None:
    """Generate text from an artifact, printed as it comes."""
    model = qcompile.load(
        artifact, engine=engine, max_context=max_context, kv_bytes=kv_bytes, page_tokens=page_tokens, allow_native=allow_native
    )
    content = [{"role": "user", "content": prompt}] if chat else prompt
    pieces = model.generate(
        content, max_new_tokens=count, stream=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
