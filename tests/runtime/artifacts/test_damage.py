"""What is damaged, foreign or hostile does not load."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import ArtifactError
from qcompile.ir.tensor_file import write_constants
from qcompile.runtime.artifact import load_artifact
from qcompile.runtime.manifest import SCHEMA_VERSION, file_entry
from qcompile.runtime.weights import WeightsFile, chunk_hashes
from tests.runtime.artifacts.tampering import Change, alter, flip, node_of, reseal, step_of

LINEAR, HEAD = "qcompile.quantized_linear.default", "lm_head.weight.codes"


def test_a_missing_directory_manifest_or_file_is_named(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere: expected the directory of an artifact, got nothing; give the directory that save"):
        qcompile.load(artifact / "nowhere")
    with pytest.raises(ArtifactError, match=r"graph.json: expected the directory of an artifact, got a file"):
        qcompile.load(artifact / "graph.json")
    (artifact / "plan.json").unlink()
    with pytest.raises(ArtifactError, match=r"plan.json: expected a file of the artifact, got none; copy the artifact again"):
        qcompile.load(artifact)
    (artifact / "weights.safetensors").unlink()
    reseal(artifact, change=lambda manifest: manifest["files"].pop("plan.json"))
    with pytest.raises(ArtifactError, match=r"manifest.json: expected an entry for plan.json, got none"):
        qcompile.load(artifact)
    (artifact / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"expected an artifact, got a directory without manifest.json; an interrupted save leaves no"):
        qcompile.load(artifact)


def test_missing_and_truncated_weights_are_named(artifact: Path) -> None:
    path = artifact / "weights.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ArtifactError, match=rf"weights.safetensors: expected {size} bytes, got {size - 1}; copy the artifact again"):
        qcompile.load(artifact)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"weights.safetensors: expected the artifact's weights, got no such file"):
        qcompile.load(artifact)


@pytest.mark.parametrize("name", ["graph.json", "plan.json", "config.json", "kernels/kernels.json"])
def test_one_flipped_bit_in_a_file_is_found(name: str, artifact: Path) -> None:
    flip(artifact / name, (artifact / name).stat().st_size // 2)
    with pytest.raises(ArtifactError, match=rf"{name}: damaged: its contents do not have the SHA-256 that the manifest gives; copy"):
        qcompile.load(artifact)


def test_one_flipped_bit_in_a_kernel_is_found(sm90: tuple[CompiledModel, Path], tmp_path: Path) -> None:
    for suffix in (".py", ".cubin"):
        root = Path(shutil.copytree(sm90[1], tmp_path / suffix))
        kernel = sorted((root / "kernels").glob(f"*{suffix}"))[0]
        flip(kernel, 100)
        with pytest.raises(ArtifactError, match=rf"{re.escape(kernel.name)}: damaged: its contents do not have the SHA-256"):
            load_artifact(root, allow_native=True)


def test_any_flipped_bit_in_the_manifest_is_found(artifact: Path) -> None:
    path = artifact / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 31):
        flip(path, place, 1 << place % 8)
        with pytest.raises(ArtifactError, match=r"manifest.json: (damaged|expected)"):
            load_artifact(artifact)
        path.write_bytes(content)
    exponent = content.replace(b"e-05", b"E-05", 1)  # the same number, one bit apart
    if exponent != content:
        path.write_bytes(exponent)
        with pytest.raises(ArtifactError, match=r"manifest.json: damaged"):
            load_artifact(artifact)


def test_a_flipped_bit_in_the_weights_is_found_before_the_weight_is_used(artifact: Path) -> None:
    flip(artifact / "weights.safetensors", -1)
    with pytest.raises(ArtifactError, match=r"weights.safetensors: damaged: bytes 0 to \d+ do not have the SHA-256 that the manifest"):
        load_artifact(artifact)


def test_weights_are_verified_chunk_by_chunk_when_first_read(compiled: CompiledModel, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_constants(path, compiled.contents.constants)
    hashes = chunk_hashes(path, 4096)
    flip(path, -1)
    file = WeightsFile(path, hashes, 4096)
    by_end = sorted(file.header, key=lambda name: file.header[name][3])
    first, last = by_end[0], by_end[-1]
    assert torch.equal(file.tensor(first), compiled.contents.constants[first].materialize())
    with pytest.raises(ArtifactError, match=rf"weights.safetensors: damaged: bytes {(len(hashes) - 1) * 4096} to \d+ do not have"):
        file.tensor(last)
    with pytest.raises(ArtifactError, match=r"weights.safetensors: damaged"):
        file.verify_all()


def test_what_is_read_can_be_written_to_without_touching_the_file(artifact: Path) -> None:
    before = (artifact / "weights.safetensors").read_bytes()
    load_artifact(artifact).constants[HEAD].materialize().zero_()
    assert (artifact / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_other_schema_versions_are_refused(version: int, artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_bytes()) | {"schema_version": version, "qcompile": "7.8.9"}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    expected = (
        rf"expected schema version {SCHEMA_VERSION}, got {version} \(written by qcompile 7.8.9\); compile the model again, or use that"
    )
    with pytest.raises(ArtifactError, match=expected):
        qcompile.load(artifact)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b'{"schema_version": 1, "x": NaN}', b'{"schema_version": 1, "x": "\\ud800"}']
)
def test_a_manifest_that_is_no_manifest(content: bytes, artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest.json: (damaged|expected JSON|expected an object with schema_version)"):
        qcompile.load(artifact)


# --- malice: every hash is right


HOSTILE = ["aten.from_file.default", "builtins.eval", "qcompile.run", "", None, ["aten.add.Tensor"]]


@pytest.mark.parametrize("name", HOSTILE)
def test_operators_off_the_list_are_refused_in_a_graph(name: Any, artifact: Path) -> None:
    alter(artifact, "graph.json", lambda graph: node_of(graph, LINEAR).update(target=name))
    expected = rf"graph.json: quantized_linear\w*: expected an operator of the allow-list .*, got {re.escape(repr(name))}; do not run this"
    with pytest.raises(ArtifactError, match=expected):
        qcompile.load(artifact)


@pytest.mark.parametrize("name", ["aten.from_file.default", "builtins.eval", ""])
def test_operators_off_the_list_are_refused_in_a_plan(name: str, artifact: Path) -> None:
    alter(artifact, "plan.json", lambda plan: step_of(plan, LINEAR).update(operator=name))
    with pytest.raises(
        ArtifactError, match=rf"plan.json: decode: step quantized_linear\w*: expected an operator of the allow-list .*, got '{name}'"
    ):
        qcompile.load(artifact)


def _calls_module(graph: Any) -> None:
    node_of(graph, LINEAR).update(op="call_method", target="__reduce__")


@pytest.mark.parametrize(("change", "message"), [
    (_calls_module, "graph.json: quantized_linear.*: expected a placeholder, constant, call or output, got 'call_method'"),
    (lambda graph: graph.pop("interface"), "graph.json: expected an object with interface, constants and nodes"),
    (lambda graph: graph["nodes"].append("print()"), "graph.json: expected nodes with names, got 'print"),
    (lambda graph: graph["constants"].pop(HEAD), f"{HEAD}: expected a constant of weights.safetensors, got none"),
    (lambda graph: graph["constants"][HEAD].update(shape=[1, 2]), rf"{HEAD}: expected uint8 \[1, 2\], got torch"),
    (lambda graph: graph["constants"][HEAD].update(format="int4 x"), f"{HEAD}: expected a format that exists"),
    (lambda graph: graph["constants"].update(more={"dtype": "fp32"}), "more: expected it in weights.safetensors, got no tensor"),
])  # fmt: skip
def test_graphs_of_another_form_are_refused(change: Change, message: str, artifact: Path) -> None:
    alter(artifact, "graph.json", change)
    with pytest.raises(ArtifactError, match=message):
        qcompile.load(artifact)


def _argument(value: Any) -> Change:
    return lambda plan: step_of(plan, LINEAR)["args"].append(value)


def _buffers(plan: Any) -> Any:
    return plan["entries"]["decode"]["buffers"]


def _loop(plan: Any) -> None:
    first, second = [name for name, buffer in _buffers(plan).items() if buffer["kind"] == "intermediate"][:2]
    _buffers(plan)[first]["alias"], _buffers(plan)[second]["alias"] = second, first


def _intermediate(plan: Any) -> Any:
    return next(buffer for buffer in _buffers(plan).values() if buffer["kind"] == "intermediate" and not buffer["alias"])


def _orphan(plan: Any) -> None:
    _buffers(plan)["orphan"] = _intermediate(plan) | {"name": "orphan"}


@pytest.mark.parametrize(("change", "message"), [
    (_argument({"dtype": "load"}), "plan.json: decode: step quantized_linear.*: expected a dtype, got 'load'"),
    (_argument({"eval": "1"}), "step quantized_linear.*: expected an argument of buffer, size, dtype, float, got \"{'eval': '1'}\""),
    (_argument({"size": ["pow", 9, 9]}), "step quantized_linear.*: expected an argument of buffer, size, dtype, float"),
    (_argument({"float": "9"}), "step quantized_linear.*: expected an argument of buffer, size, dtype, float"),
    (_argument({"buffer": "secret"}), "step quantized_linear.*: expected buffers of the entry, got 'secret'"),
    (_loop, "plan.json: decode: .*: expected a view of other memory, got one of itself"),
    (_orphan, "plan.json: decode: orphan: expected a step that writes it, got none"),
    (lambda plan: _intermediate(plan).update(offset=1 << 40), r"expected an offset inside the arena of \d+ bytes, got 1099511627776"),
    (lambda plan: _intermediate(plan).update(kind="file"), "expected a buffer of kind input, constant, .*, got 'file'"),
    (lambda plan: _intermediate(plan).update(dtype="load"), "expected a dtype, got 'load'"),
    (lambda plan: _intermediate(plan).update(name="x"), "expected a buffer of that name, got 'x'"),
    (lambda plan: _buffers(plan)[HEAD].update(shape=[1 << 40]), rf"{HEAD}: expected uint8 \[1099511627776\], got"),
    (lambda plan: plan.update(more=1), "plan.json: expected the keys entries, kernels, got 'more'"),
    (lambda plan: plan.pop("entries"), r"plan.json: expected the key 'entries' \(Plan\), got kernels"),
    (lambda plan: plan["entries"]["decode"].update(arena_bytes="1"), "plan.json.entries.decode.arena_bytes: expected int, got str '1'"),
    (lambda plan: plan["entries"]["decode"].update(steps=True), "plan.json.entries.decode.steps: expected a list, got bool 'True'"),
])  # fmt: skip
def test_plans_of_another_form_are_refused(change: Change, message: str, artifact: Path) -> None:
    alter(artifact, "plan.json", change)
    with pytest.raises(ArtifactError, match=message):
        qcompile.load(artifact)


@pytest.mark.parametrize("depth", [480, 100_000])
def test_deep_nesting_is_an_error_like_any_other(depth: int, artifact: Path) -> None:
    text = (artifact / "plan.json").read_text()
    (artifact / "plan.json").write_text(text.replace('"args":[', '"args":[' + "[" * depth + "]" * depth + ",", 1))
    reseal(artifact, "plan.json")
    with pytest.raises(ArtifactError, match=r"plan.json: expected (JSON, got RecursionError|values nested a few times)"):
        qcompile.load(artifact)


@pytest.mark.parametrize(
    "name", ["../secret", "kernels/../../secret", "/etc/hostname", "a\\b", "", "a//b", "./graph.json", "a\0b", "x" * 300]
)
def test_paths_outside_the_artifact_are_refused(name: str, artifact: Path) -> None:
    (artifact.parent / "secret").write_text("secret")
    reseal(artifact, change=lambda manifest: manifest["files"].update({name: file_entry(b"secret")}))
    expected = f"manifest.json: expected files inside the artifact, got {name!r}; do not load this artifact"
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        qcompile.load(artifact)


@pytest.mark.parametrize("name", ["config.json", "kernels/kernels.json", "weights.safetensors"])
def test_links_out_of_the_artifact_are_refused(name: str, artifact: Path) -> None:
    outside = artifact.parent / "outside"
    (artifact / name).rename(outside)
    (artifact / name).symlink_to(outside)
    with pytest.raises(
        ArtifactError, match=rf"expected files inside the artifact, got '{name}', a link to .*outside|artifact's weights, got no"
    ):
        qcompile.load(artifact)
    (artifact / name).unlink()
    (artifact / name).symlink_to(artifact / name)
    with pytest.raises(ArtifactError, match=r"expected a file of the artifact, got none|artifact's weights, got no such file"):
        qcompile.load(artifact)


def _header(change: Change) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # else the tensors behind it are not aligned, which is a fault of its own
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return write


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: path.write_bytes(b""), "expected a safetensors header, got 0 bytes"),
    (lambda path: path.write_bytes(b"\xff" * 64), "expected a header inside the file of 64 bytes, got one of 18446744073709551615"),
    (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "expected a safetensors header, got AttributeError"),
    (_header(lambda header: header[HEAD].update(data_offsets=[0, 1 << 40])), "got ValueError: .*inside"),
    (_header(lambda header: header[HEAD].update(data_offsets=[-64, 0])), r"\[-64, 0\].* does not lie inside the file"),
    (_header(lambda header: header[HEAD].update(shape=[-100, -32])), r"\[-100, -32\].* does not lie inside the file"),
    (_header(lambda header: header[HEAD].update(dtype="PICKLE")), "expected a safetensors header, got KeyError: 'PICKLE"),
    (_header(lambda header: header[HEAD].pop("shape")), "expected a safetensors header, got KeyError: 'shape'"),
])  # fmt: skip
def test_weights_that_point_elsewhere_are_refused(write: Callable[[Path], None], message: str, artifact: Path) -> None:
    write(artifact / "weights.safetensors")
    reseal(artifact, "weights.safetensors")
    with pytest.raises(ArtifactError, match=rf"weights.safetensors: .*{message}"):
        qcompile.load(artifact)


def test_a_header_written_anew_is_no_damage(artifact: Path) -> None:
    _header(lambda header: None)(artifact / "weights.safetensors")
    reseal(artifact, "weights.safetensors")
    assert HEAD in load_artifact(artifact).constants


def test_a_chunk_without_a_hash_is_refused(artifact: Path) -> None:
    reseal(artifact, change=lambda manifest: manifest["weights"].update(sha256=[]))
    with pytest.raises(ArtifactError, match=r"weights.safetensors: damaged: bytes 0 to"):
        qcompile.load(artifact)


# --- native code
