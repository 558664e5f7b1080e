"""The command line: one module per command, put together in `app`."""

from __future__ import annotations


def main() -> None:
    """Run `qcompile`; exits with 0, 2 for bad input, 1 for a crash, 130 when interrupted."""
    from qcompile.cli.app import app

    app(prog_name="qcompile")
