"""An artifact: a directory that holds everything a compiled model needs to run. Written whole or not at all; read without trusting it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qcompile.collecting import without_collecting
from qcompile.errors import ArtifactError, UntrustedCodeError
from qcompile.ir.codec import decode, encode
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Kernel, Plan
from qcompile.ir.matmuls import matmul_text
from qcompile.ir.memory import dtype_of
from qcompile.ir.native import NATIVE_SOURCE, Segment, plan_digest, segments
from qcompile.ir.records import Assets, CoverageRow, PassRecord, Settings
from qcompile.ir.serialize import check_graph_json, format_of, graph_to_json
from qcompile.ir.serialize_plan import check_constants, kernels_from_json, kernels_to_json, plan_from_json, plan_to_json
from qcompile.ir.tensor_file import write_constants
from qcompile.runtime.manifest import (
    GRAPH,
    KERNELS,
    MANIFEST,
    PLAN,
    WEIGHTS,
    canonical,
    file_entry,
    parse,
    read_checked,
    read_manifest,
    require_name,
    seal,
)
from qcompile.runtime.onnx_files import NAMES as ONNX_NAMES
from qcompile.runtime.onnx_files import OnnxFiles, found_onnx, put_onnx
from qcompile.runtime.trust import trust, untrusted
from qcompile.runtime.weights import CHUNK_BYTES, ArtifactSource, WeightsFile, chunk_hashes
from qcompile.version import __version__


class ArtifactContents:
    """A compiled model: the graph it came from, the plan that runs, kernels, and what it carries beside its weights.

    Attributes:
        plan: entry points.
        kernels: kernel name -> source and launches.
        binaries: file name -> native code, to be run only if `native_allowed`, and the source of a library.
        assets: tokenizer files, end-of-sequence ids and such.
        target: `ARCH-SCHEME[-KV]`.
        pipeline: the passes that made it, as text.
        records: one per pass.
        coverage: one row per linear, embedding and attention.
        settings: what the passes were told beside; with it they can be run again.
        constants: weights by name, read when asked for.
        path: where it was loaded from; None for one that was just compiled.
        digest: the hash of its manifest, hence of everything in it; "" for one that was just compiled.
        onnx: the ONNX file in it; None where there is none.
        untrusted: names of binaries that were not built on this machine and that the caller did not allow.
        torch_version: of the process that compiled it.
    """

    def __init__(
        self, graph: Graph | Callable[[], Graph], plan: Plan, kernels: dict[str, Kernel], binaries: dict[str, bytes], assets: Assets,
        target: str, pipeline: str, records: Sequence[PassRecord] = (), coverage: Sequence[CoverageRow] = (), *,
        constants: Mapping[str, Constant] | None = None, path: Path | None = None, untrusted: tuple[str, ...] = (),
        torch_version: str = torch.__version__, digest: str = "", onnx: OnnxFiles | None = None, settings: Settings | None = None,
    ) -> None:  # fmt: skip
        """Hold the parts; a graph given as a function is built when it is first asked for."""
        self._graph = graph
        self.plan, self.kernels, self.binaries = plan, kernels, binaries
        self.assets, self.target, self.pipeline = assets, target, pipeline
        self.records, self.coverage = list(records), list(coverage)
        self.constants: Mapping[str, Constant] = self.graph.constants if constants is None else constants
        self.path, self.untrusted, self.torch_version = path, untrusted, torch_version
        self._native: tuple[Plan, dict[str, Kernel], dict[str, list[Segment]], str] | None = None
        self.digest, self.onnx, self.settings = digest, onnx, settings or Settings()

    @property
    def graph(self) -> Graph:
        """The final graph before lowering: to be printed, exported, run by reference or rebuilt for another target."""
        if not isinstance(self._graph, Graph):
            self._graph = self._graph()
        return self._graph

    @property
    def native_allowed(self) -> bool:
        """Whether `binaries` may be run: each was built on this machine, or the caller allowed them."""
        return not self.untrusted

    def require_native(self, name: str | None = None) -> None:
        """Refuse native code that nobody vouched for: the binary called `name`, or any.

        Raises:
            UntrustedCodeError: naming a binary and the two remedies.
        """
        found = [item for item in self.untrusted if name in (None, item)]
        if found:
            raise UntrustedCodeError(
                f"{self.path}: expected kernels built on this machine, got {len(found)} that were not "
                f"({found[0]}); if you trust where the artifact came from, load it with allow_native=True, else "
                "compile the model here"
            )

    @property
    def matmul(self) -> str | None:
        """How linears with quantized weights multiply, in a line; None where there are none."""
        return matmul_text(self.coverage, self.target)

    @without_collecting()
    def native_runs(self) -> tuple[dict[str, list[Segment]], str]:
        """The runs of native steps of each entry, and the digest that a library names which serves them; found once for a plan."""
        found = self._native
        if found is None or found[0] is not self.plan or found[1] is not self.kernels:
            runs = {name: segments(entry, self.kernels) for name, entry in self.plan.entries.items()}
            found = self._native = (self.plan, self.kernels, runs, plan_digest(self.plan, self.kernels, runs))
        return found[2], found[3]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.nbytes for constant in self.constants.values())


def save_artifact(
    path: str | os.PathLike[str], contents: ArtifactContents, *, overwrite: bool = False, onnx_model: Path | None = None
) -> None:
    """Write `contents` to the directory `path`, with a copy of `onnx_model` if given: into a temporary sibling that is renamed at the end.

    Raises:
        ArtifactError: if `path` exists and `overwrite` is not set, or is something other than an artifact.
    """
    target = Path(path)
    _require_free(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(target, "tmp") as directory:
            _write(directory, contents, onnx_model)
            _put(directory, target)
    except OSError as error:
        raise ArtifactError(f"{target}: expected a path that can be written, got {error}; choose another or make room") from error
    if contents.path is None:
        trust(contents.binaries.values())


def _put(directory: Path, target: Path) -> None:
    """Rename `directory` to `target`; what was there before comes back if that fails."""
    if not target.exists():
        directory.rename(target)
        return
    with _temporary_sibling(target, "old") as retired:
        old = target.rename(retired / "artifact")
        try:
            directory.rename(target)
        except BaseException:
            old.rename(target)
            raise


def _require_free(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ArtifactError(
            f"{target}: expected a path that does not exist, got an existing one; choose another, or overwrite it "
            "(overwrite=True, --overwrite)"
        )
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise ArtifactError(
            f"{target}: expected an artifact to overwrite, got something without {MANIFEST}; remove it yourself or choose another path"
        )


@contextlib.contextmanager
def _temporary_sibling(target: Path, purpose: str) -> Iterator[Path]:
    """A new directory beside `target`, so that renaming it is atomic; it is gone afterwards unless it was renamed."""
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.{purpose}-", dir=target.parent))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write(directory: Path, contents: ArtifactContents, onnx_model: Path | None) -> None:
    """All files, the manifest last: a directory without one is no artifact."""
    files = artifact_files(contents)
    write_constants(directory / WEIGHTS, contents.constants)
    (directory / "kernels").mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    onnx = {} if onnx_model is None else {"onnx": put_onnx(onnx_model, directory)}
    weights = directory / WEIGHTS
    entry = weights_entry(weights.stat().st_size, chunk_hashes(weights))
    (directory / MANIFEST).write_bytes(seal(manifest(contents, files, entry) | onnx))


def artifact_files(contents: ArtifactContents) -> dict[str, bytes]:
    """Every file but weights, ONNX and manifest, by name.

    Raises:
        ArtifactError: for a name that is no plain file name, or one that the artifact uses itself.
    """
    files: dict[str, bytes] = {
        GRAPH: canonical(graph_to_json(contents.graph)),
        PLAN: canonical(plan_to_json(contents.plan)),
        KERNELS: canonical(kernels_to_json(contents.kernels)),
    }
    for name, kernel in contents.kernels.items():
        if kernel.source:
            files[f"kernels/{require_name(name + kernel.suffix)}"] = kernel.source.encode()
    files |= {f"kernels/{require_name(name)}": binary for name, binary in contents.binaries.items()}
    for name, content in contents.assets.files.items():
        if require_name(name) in (MANIFEST, GRAPH, PLAN, WEIGHTS, "kernels", *ONNX_NAMES):
            raise ArtifactError(f"asset {name!r}: expected a name that the artifact does not use itself; rename it")
        files[name] = content
    return files


def weights_entry(size: int, hashes: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the weights."""
    return {"bytes": size, "chunk_bytes": CHUNK_BYTES, "sha256": list(hashes)}


def manifest(contents: ArtifactContents, files: Mapping[str, bytes], weights: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of an artifact without an ONNX file, before it is sealed; `weights` is a `weights_entry`."""
    return {
        "qcompile": __version__,
        "torch": contents.torch_version,
        "target": contents.target,
        "pipeline": contents.pipeline,
        "settings": encode(contents.settings),
        "matmul": contents.matmul,
        "assets": asdict(contents.assets) | {"files": sorted(contents.assets.files)},
        "passes": encode(contents.records),
        "coverage": encode(contents.coverage),
        "files": {name: file_entry(content) for name, content in sorted(files.items())},
        "weights": dict(weights),
    }


@without_collecting()
def load_artifact(path: str | os.PathLike[str], *, allow_native: bool = False) -> ArtifactContents:
    """Read an artifact: everything but the weights is verified now, each weight when it is first read. Nothing is unpickled.

    Args:
        path: the directory.
        allow_native: let native code run that was not built on this machine.

    Raises:
        ArtifactError: if it is missing, damaged, of another version or hostile, naming the file.
    """
    root = Path(path)
    manifest = read_manifest(root)
    files = {name: read_checked(root, name, entry) for name, entry in manifest["files"].items()}
    for name in (GRAPH, PLAN, KERNELS):
        if name not in files:
            raise ArtifactError(f"{root / MANIFEST}: expected an entry for {name}, got none; copy the artifact again")
    stored = parse(files[GRAPH], root / GRAPH)
    check_graph_json(stored)
    constants = _constants(root, manifest["weights"], stored)
    sources = {Path(name).stem: _text(root / name, content) for name, content in files.items() if _is_source(name)}
    plan = plan_from_json(parse(files[PLAN], root / PLAN))
    kernels = kernels_from_json(parse(files[KERNELS], root / KERNELS), sources)
    check_constants(plan, constants)
    binaries = {
        name.removeprefix("kernels/"): content
        for name, content in files.items()
        if name.startswith("kernels/") and not _is_source(name) and name != KERNELS
    }
    return ArtifactContents(
        graph=lambda: _graph(stored, constants),
        plan=plan,
        kernels=kernels,
        binaries=binaries,
        assets=_assets(manifest["assets"], files, root),
        target=decode(str, manifest.get("target"), "manifest.json: target"),
        pipeline=decode(str, manifest.get("pipeline"), "manifest.json: pipeline"),
        settings=decode(Settings, manifest.get("settings", {}), "manifest.json: settings"),
        records=decode(tuple[PassRecord, ...], manifest.get("passes"), "manifest.json: passes"),
        coverage=decode(tuple[CoverageRow, ...], manifest.get("coverage"), "manifest.json: coverage"),
        constants=constants,
        path=root,
        untrusted=() if allow_native else untrusted({name: code for name, code in binaries.items() if name != NATIVE_SOURCE}),
        torch_version=str(manifest.get("torch")),
        digest=str(manifest["sha256"]),
        onnx=found_onnx(root, manifest.get("onnx")),
    )


def _is_source(name: str) -> bool:
    """Whether a file is the source of one kernel; that of a whole library stays beside what was built from it."""
    return name.startswith("kernels/") and name.endswith((".py", ".cpp")) and name != f"kernels/{NATIVE_SOURCE}"


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: expected UTF-8 text, got {error}; compile again") from error


def _graph(stored: dict[str, Any], constants: dict[str, Constant]) -> Graph:
    # Only whoever asks for the graph itself pays for its symbolic shapes.
    from qcompile.ir.deserialize import graph_from_json

    return graph_from_json(stored, constants)


def _constants(root: Path, entry: Any, stored: Mapping[str, Any]) -> dict[str, Constant]:
    path = root / WEIGHTS
    hashes = decode(tuple[str, ...], entry.get("sha256"), "manifest.json: weights.sha256")
    chunk_bytes, size = (decode(int, entry.get(key), f"manifest.json: weights.{key}") for key in ("chunk_bytes", "bytes"))
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f"{path}: expected the artifact's weights, got no such file; copy the artifact again")
    if path.stat().st_size != size or chunk_bytes < 1:
        raise ArtifactError(f"{path}: expected {size} bytes, got {path.stat().st_size}; copy the artifact again")
    file = WeightsFile(path, hashes, chunk_bytes)
    table = decode(dict[str, dict[str, Any]], stored.get("constants"), "graph.json: constants")
    return {name: _constant(file, name, item) for name, item in table.items()}


def _constant(file: WeightsFile, name: str, item: Mapping[str, Any]) -> Constant:
    where = f"graph.json: constant {name}"
    if name not in file.header:
        raise ArtifactError(f"{where}: expected it in {WEIGHTS}, got no tensor of that name; copy the artifact again")
    form = item.get("format")
    log = decode(tuple[str, ...], item.get("log", []), f"{where}: log")
    constant = Constant(ArtifactSource(file, name), format=None if form is None else format_of(str(form), where), history=log)
    if list(constant.shape) != item.get("shape") or constant.dtype != dtype_of(item.get("dtype"), where):
        raise ArtifactError(
            f"{where}: expected {item.get('dtype')} {item.get('shape')}, got {constant.dtype} {list(constant.shape)} in "
            f"{WEIGHTS}; copy the artifact again"
        )
    return constant


def _assets(data: Any, files: Mapping[str, bytes], root: Path) -> Assets:
    names = decode(tuple[str, ...], data.get("files") if isinstance(data, dict) else None, "manifest.json: assets.files")
    missing = [name for name in names if name not in files]
    if missing:
        raise ArtifactError(f"{root / MANIFEST}: expected an entry for {missing[0]}, got none; copy the artifact again")
    plain = decode(Assets, data | {"files": {}}, "manifest.json: assets")
    plain.files = {name: files[name] for name in names}
    return plain
