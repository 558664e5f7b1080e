"""Reads a dump directory; each file when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from qcompile.dump.rows import record_of
from qcompile.dump.writer import FORMAT, GRAPHS_FILE, HEADING_FILE, KERNELS_FILE, RECORDS_FILE
from qcompile.errors import SourceError
from qcompile.ir.records import PassRecord

T = TypeVar("T")
Node = dict[str, Any]
"""A node record, as `docs/dumps.md` describes it."""


@dataclass(frozen=True)
class Heading:
    """What `dump.json` says: what was compiled, by which version, and whether the compilation came to its end."""

    qcompile: str
    complete: bool
    model: str
    target: str
    pipeline: str


@dataclass(frozen=True)
class Listing:
    """A graph as it was at one point.

    Attributes:
        name: `000_input`, `NNN_pass-name`: also the stem of its files.
        index: of the pass that made it, None for the input.
        nodes: in order; one that a pass left alone is the same object as in the listing before.
    """

    name: str
    index: int | None
    nodes: tuple[Node, ...]

    def node(self, name: str) -> Node | None:
        """The node called `name`, or None."""
        return next((node for node in self.nodes if node["name"] == name), None)


@dataclass(frozen=True)
class Dump:
    """A dump directory that has been opened. Files are read, and checked, when they are first asked for.

    Every property raises SourceError for a damaged file, and for one that an interrupted compilation has not come to write.
    """

    path: Path
    heading: Heading

    @classmethod
    def open(cls, path: Path) -> Dump:
        """The dump in the directory `path`; one that was interrupted is opened too (`heading.complete`).

        Raises:
            SourceError: for something that is no dump, a dump of another format, or one with a damaged `dump.json`.
        """
        if not path.is_dir():
            what = "a file" if path.exists() else "nothing"
            raise SourceError(f"{path}: expected the directory of a dump, got {what}; give the one that --dump (dump=) wrote")
        file = path / HEADING_FILE
        if not file.is_file():
            old = (path / RECORDS_FILE).is_file()
            what = f"one of a version that wrote no {HEADING_FILE}; compile again" if old else f"a directory without {HEADING_FILE}"
            raise SourceError(f"{path}: expected a dump, got {what}{'' if old else '; give the one that --dump (dump=) wrote'}")
        values = _parsed(file)
        if not isinstance(values, dict) or "format" not in values:
            raise SourceError(f"{file}: expected an object with the format of the dump, got {type(values).__name__}; write it anew")
        if values["format"] != FORMAT:
            raise SourceError(
                f"{path}: expected a dump of format {FORMAT}, got format {values['format']} (written by qcompile "
                f"{values.get('qcompile')}); compile again, or read it with that version"
            )
        return cls(path, _checked(file, lambda: _heading(values)))

    @property
    def complete(self) -> bool:
        """Whether the compilation came to its end."""
        return self.heading.complete

    def require_complete(self, purpose: str) -> None:
        """Refuse a dump whose compilation was interrupted.

        Raises:
            SourceError: saying which pass was the last that it holds, and what can still be read.
        """
        if not self.complete:
            raise SourceError(f"{self.path}: {purpose}: expected a complete dump, got one that was interrupted {self.interruption}")

    @property
    def interruption(self) -> str:
        """Where an interrupted compilation stopped, and what can be read of it."""
        records = self.records
        last = f"after pass {records[-1].index} ({records[-1].name})" if records else "before the first pass was done"
        return f"{last}; listings, diffs, {RECORDS_FILE} and {GRAPHS_FILE} up to there can be read; compile again for the rest"

    @cached_property
    def passes(self) -> list[dict[str, Any]]:
        """The rows of `passes.json`."""
        file = self.path / RECORDS_FILE
        if not file.is_file() and not self.complete:
            return []
        return _rows(file, self._json(RECORDS_FILE), ("index", "name", "spec", "changed", "nodes_after", "seconds", "bytes"))

    @cached_property
    def records(self) -> list[PassRecord]:
        """The same as records."""
        return _checked(self.path / RECORDS_FILE, lambda: [record_of(row) for row in self.passes])

    @cached_property
    def listings(self) -> list[Listing]:
        """The graphs: the input, then one after each pass that changed something. Of an interrupted dump, those that are whole."""
        return list(self._listings())

    def _listings(self) -> Iterator[Listing]:
        file = self.path / GRAPHS_FILE
        known: dict[int, Node] = {}
        *whole, rest = self._text(GRAPHS_FILE).split("\n")
        if rest and self.complete:
            raise SourceError(f"{file}: expected whole lines, got one that breaks off after {len(whole)}; write the dump anew")
        for number, line in enumerate(whole, start=1):
            yield _checked(file, partial(_listing, line, known), f" line {number}")

    def text(self, listing: str) -> str:
        """The listing called `listing` as people read it."""
        return self._text(f"{listing}.txt")

    def diff(self, listing: str) -> str:
        """What the pass that made a listing changed, as a unified diff; "" for the input."""
        return self._text(f"{listing}.diff") if not listing.startswith("000_") else ""

    @cached_property
    def coverage(self) -> list[dict[str, Any]]:
        """Format and kernel of every linear, embedding and attention, or why it was left alone."""
        return self._rows("coverage.json", ("node", "operator", "format", "kernel", "reason"))

    @cached_property
    def notes(self) -> list[dict[str, Any]]:
        """What passes left alone, and why."""
        return self._rows("notes.json", ("pass", "node", "reason", "chosen"))

    @cached_property
    def cache(self) -> list[dict[str, Any]]:
        """The cache of each layer."""
        return self._rows("cache.json", ("layer", "keys", "values"))

    @cached_property
    def kernels(self) -> list[dict[str, Any]]:
        """Each kernel, the nodes that it serves, and what its launches take."""
        return self._rows(KERNELS_FILE, ("name", "spec", "file", "nodes", "launches"))

    def kernel_source(self, row: dict[str, Any]) -> str:
        """The source of a row of `kernels`; "" where the engine brings its own code.

        Raises:
            SourceError: if its file is missing or lies elsewhere.
        """
        if row["file"] is None:
            return ""
        path = self.path / str(row["file"])
        if path.resolve().parent != (self.path / "kernels").resolve():
            raise SourceError(f"{self.path / KERNELS_FILE}: expected a file in kernels/, got {row['file']!r}; do not trust this dump")
        return self._text(str(row["file"]))

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Target, bytes and bits."""
        return self._object("sizes.json", ("target", "weight_bytes", "bits_per_weight"))

    @cached_property
    def distributions(self) -> dict[str, Any]:
        """Of weights and activations, stage by stage."""
        return self._object("distributions.json", ("weights", "activations"))

    @cached_property
    def blame(self) -> dict[str, Any] | None:
        """What `qcompile blame` found, or None if it was not run."""
        return self._object("blame.json", ("total_kl", "cells")) if (self.path / "blame.json").is_file() else None

    def _rows(self, name: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        return _rows(self.path / name, self._json(name), keys)

    def _object(self, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
        values = self._json(name)
        if not isinstance(values, dict) or not set(keys) <= set(values):
            raise SourceError(f"{self.path / name}: expected an object with {', '.join(keys)}, got {_kind(values)}; write the dump anew")
        return values

    def _json(self, name: str) -> Any:
        file = self.path / name
        if not file.is_file() and not self.complete:
            self.require_complete(name)
        return _parsed(file)

    def _text(self, name: str) -> str:
        return _read(self.path / name)


def is_dump(path: Path) -> bool:
    """Whether a directory looks like a dump, of this format or another, rather than like an artifact."""
    return not (path / "manifest.json").is_file() and any((path / name).is_file() for name in (HEADING_FILE, RECORDS_FILE))


def _heading(values: dict[str, Any]) -> Heading:
    return Heading(str(values["qcompile"]), bool(values["complete"]), str(values["model"]), str(values["target"]), str(values["pipeline"]))


def _listing(line: str, known: dict[int, Node]) -> Listing:
    values = json.loads(line)
    for node in values["new"]:
        if not isinstance(node["name"], str):
            raise TypeError(f"node {node['id']} has no name")
        known[node["id"]] = node
    return Listing(values["listing"], values["pass"], tuple(known[number] for number in values["order"]))


def _rows(file: Path, values: Any, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    whole = isinstance(values, list) and all(isinstance(row, dict) and set(keys) <= set(row) for row in values)
    if not whole:
        raise SourceError(f"{file}: expected a list of objects with {', '.join(keys)}, got {_kind(values)}; write the dump anew")
    return list(values)


def _kind(values: Any) -> str:
    """What came instead, in a few words."""
    if isinstance(values, dict):
        return f"one with {', '.join(map(str, values)) or 'nothing'}"
    return "others" if isinstance(values, list) else type(values).__name__


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{file}: expected a file of the dump, got {error.strerror}; write the dump anew") from None
    except UnicodeDecodeError:
        raise SourceError(f"{file}: expected text, got bytes that are not UTF-8; write the dump anew") from None


def _parsed(file: Path) -> Any:
    return _checked(file, lambda: json.loads(_read(file)))


def _checked(file: Path, read: Callable[[], T], where: str = "") -> T:
    """What `read` makes of a file.

    Raises:
        SourceError: naming the file, if that is not what it was expected to be.
    """
    try:
        return read()
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{file}{where}: damaged: expected what a dump holds there, got {error!r}; write the dump anew") from None
