"""What the shell is told: 0, 2 for bad input, 1 for a crash, 130 when interrupted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import qcompile
from qcompile.errors import ArtifactError

Invoke = Callable[..., Any]


def _raising(error: BaseException) -> Callable[..., Any]:
    def verb(*_: Any, **__: Any) -> Any:
        raise error

    return verb


def test_bad_input_is_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "out/manifest.json: expected schema [1], got [2]; compile it anew"
    monkeypatch.setitem(vars(qcompile), "load", _raising(ArtifactError(message)))
    result = invoke("inspect", "out")
    assert result.exit_code == 2
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""


def test_a_crash_keeps_its_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(qcompile), "load", _raising(ZeroDivisionError("oops")))
    result = invoke("inspect", "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_interruption_is_130(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(qcompile), "load", _raising(KeyboardInterrupt()))
    result = invoke("inspect", "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_a_missing_option_is_bad_input(invoke: Invoke) -> None:
    result = invoke("compile", "m")
    assert result.exit_code == 2
    assert "--target" in result.stderr


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"{qcompile.__version__}\n"


def test_unknown_target_in_a_real_process() -> None:
    """Also: the whole way through the real library up to the first look at the target."""
    command = [sys.executable, "-c", "from qcompile.cli import main; main()", "compile", "nowhere", "--target", "tpu-int4", "-o", "never"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: target 'tpu-int4': expected ARCH-SCHEME[-KV] as one of cpu-fp32, ")
    assert run.stderr.count("\n") == 1
