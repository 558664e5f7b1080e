"""Progress bars: seen on a terminal, silent in a pipe."""

from __future__ import annotations

import pytest
from rich.console import Console

from qcompile import progress
from qcompile.progress import terminal_progress


def test_a_pipe_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress() as report:
        report("measuring", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_label_and_share(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "Console", lambda **options: Console(force_terminal=True, width=80, **options))
    with terminal_progress() as report:
        report("measuring", 1, 4)
    written = capsys.readouterr().err
    assert "measuring" in written
    assert "25%" in written
