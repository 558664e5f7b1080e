"""The command line in this process, with fakes behind the public verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

import qcompile
from qcompile.cli.app import app
from tests.cli.fakes import FakeModel


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What `qcompile.compile` and `qcompile.load` return; `asked` collects their arguments."""
    fake = FakeModel()

    def verb(*arguments: Any, **options: Any) -> FakeModel:
        fake.asked |= {"arguments": arguments, **options}
        return fake

    # Set in the dictionary: getattr would import what the fakes replace.
    monkeypatch.setitem(vars(qcompile), "compile", verb)
    monkeypatch.setitem(vars(qcompile), "load", verb)
    return fake


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Run `qcompile` with arguments; the result has exit_code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160", "TERM": "dumb"})
