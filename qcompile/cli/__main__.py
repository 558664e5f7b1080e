"""`python -m qcompile.cli`."""

from qcompile.cli import main

main()
