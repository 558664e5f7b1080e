"""`qcompile plan`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import qcompile
from qcompile.cli.compiling import StatusInstrument, compile_model
from qcompile.cli.output import BytesOption, JsonOption, PageOption, emit, stderr

_AS_COMPILE = (
    "recipe", "group_size", "symmetric", "weight_format", "ignore", "head_format", "quantize_head", "quantize_embedding", "matmul",
    "activation_group_size", "activation_symmetric", "activation_static", "activation_clip", "cache_keys", "cache_values", "cache_sinks",
    "cache_window", "cache_bits", "cache_before_positions", "calibration", "num_calibration_samples", "max_seq_length", "disable_pass",
    "passes", "revision", "trust_remote_code", "max_batch", "max_context", "prefill_chunk", "engine",
)  # fmt: skip
"""What `qcompile compile` takes too, with the same help and defaults."""
Command = Callable[..., None]


def _with_options_of(other: Command, names: tuple[str, ...]) -> Callable[[Command], Command]:
    """Give a command, which takes them as `**options`, parameters of another one."""

    def wrap(command: Command) -> Command:
        kinds = get_type_hints(other, include_extras=True)
        own_kinds = get_type_hints(command, include_extras=True)
        theirs = inspect.signature(other).parameters
        own = [part.replace(annotation=own_kinds[name]) for name, part in inspect.signature(command).parameters.items()]
        shared = [theirs[name].replace(annotation=kinds[name], kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        kept = [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in own if part.kind is not inspect.Parameter.VAR_KEYWORD]
        vars(command)["__signature__"] = inspect.Signature([*kept, *shared])
        return command

    return wrap


@_with_options_of(compile_model, _AS_COMPILE)
def plan_model(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, config.json or hub id, or a .gguf or .onnx file.")],
    target: Annotated[str, typer.Option("--target", "-t", help="ARCH-SCHEME[-KV], such as cpu-int4; see `qcompile targets`.")],
    kv_bytes: BytesOption = None,
    page_tokens: PageOption = None,
    device: Annotated[str | None, typer.Option(help="What speeds are planned for, such as H200; default: the target's first.")] = None,
    device_bandwidth: Annotated[float | None, typer.Option(help="Bytes per second from memory, in place of the data sheet's.")] = None,
    device_compute: Annotated[float | None, typer.Option(help="Operations per second, in place of the data sheet's.")] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Say what compiling MODEL would do, take and give, from shapes alone: no weight is read."""
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: given[name] or None for name in ("quantize_head", "quantize_embedding")}
    given["disable"] = given.pop("disable_pass", ())
    if "calibration" in given:
        given["calibration"] = Path(given["calibration"])
    console = stderr()
    console.quiet = not console.is_terminal
    with console.status(f"reading {model}") as status:
        plan = qcompile.plan(
            model, target, kv_bytes=kv_bytes, page_tokens=page_tokens, device=device, device_bandwidth=device_bandwidth,
            device_compute=device_compute, instruments=[StatusInstrument(status)], **given,
        )  # fmt: skip
    emit(plan.to_dict(), plan.tables(), as_json=as_json)
