"""What an artifact will take on disk, before a weight of it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qcompile.ir.native import NATIVE_SOURCE
from qcompile.ir.tensor_file import constants_bytes
from qcompile.runtime.artifact import ArtifactContents, artifact_files, manifest, weights_entry
from qcompile.runtime.manifest import KERNELS, seal
from qcompile.runtime.weights import CHUNK_BYTES

_HASH = "0" * 64
"""A SHA-256 in hex digits: all are alike long."""


@dataclass(frozen=True)
class ArtifactSize:
    """Bytes of an artifact by what they are for.

    Attributes:
        weights: of weights.safetensors, its header included.
        program: of the graph, the plan and the manifest.
        kernels: of kernels' sources and descriptions.
        binaries: of what is built from them.
        assets: of tokenizer files and such.
        onnx: of an ONNX file, which its target's artifacts have besides.
    """

    weights: int
    program: int
    kernels: int
    binaries: int
    assets: int
    onnx: int = 0

    @property
    def total(self) -> int:
        """Of all files."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Purpose -> bytes, and `total`."""
        return {**asdict(self), "total": self.total}


def artifact_size(contents: ArtifactContents) -> ArtifactSize:
    """The files that saving `contents` would write, without an ONNX file; constants may be unbound.

    Raises:
        ArtifactError: for what could not be saved.
    """
    weights = constants_bytes(contents.constants)
    files = artifact_files(contents)
    entry = weights_entry(weights, [_HASH] * -(-weights // CHUNK_BYTES))
    sealed = len(seal(manifest(contents, files, entry)))
    built = {f"kernels/{name}" for name in contents.binaries if name != NATIVE_SOURCE}
    sizes = {name: len(content) for name, content in files.items()}
    assets = sum(sizes[name] for name in contents.assets.files)
    binaries = sum(sizes[name] for name in built)
    kernels = sum(size for name, size in sizes.items() if name.startswith("kernels/") and name not in built and name != KERNELS)
    kernels += sizes[KERNELS]
    return ArtifactSize(weights, sum(sizes.values()) + sealed - assets - binaries - kernels, kernels, binaries, assets)
