"""What is written comes back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import ArtifactError
from qcompile.ir.provenance import origins
from qcompile.runtime.artifact import ArtifactContents, load_artifact, save_artifact
from tests.listings import without_logs
from tests.models import OTHER_FAMILIES, example_inputs, tiny


def test_everything_comes_back(compiled: CompiledModel, saved: Path) -> None:
    loaded, made = load_artifact(saved), compiled.contents
    assert loaded.plan == made.plan
    assert (loaded.kernels, loaded.binaries) == (made.kernels, made.binaries)
    assert loaded.assets == made.assets
    assert loaded.assets.files["chat_template.jinja"].decode() == "{{ 'größer' }}\n"
    assert (loaded.records, loaded.coverage) == (made.records, made.coverage)
    assert loaded.settings == made.settings
    assert loaded.settings.scheme is not None
    assert (loaded.target, loaded.pipeline, loaded.torch_version) == ("cpu-int4", made.pipeline, torch.__version__)
    assert without_logs(loaded.graph.text()) == without_logs(made.graph.text())
    assert set(loaded.constants) == set(made.constants)
    for name, constant in made.constants.items():
        assert torch.equal(loaded.constants[name].materialize(), constant.materialize()), name
        assert loaded.constants[name].format == constant.format
    assert loaded.weight_bytes == made.weight_bytes
    loaded.require_native()


def test_kernels_and_native_code_come_back(sm90: tuple[CompiledModel, Path]) -> None:
    model, path = sm90
    loaded = load_artifact(path)
    assert len(loaded.kernels) > 5
    assert len(loaded.binaries) > 5
    assert (loaded.kernels, loaded.binaries, loaded.plan) == (model.contents.kernels, model.contents.binaries, model.contents.plan)
    for name, kernel in loaded.kernels.items():
        assert (path / "kernels" / f"{name}.py").read_text() == kernel.source


def test_every_kernel_knows_the_traced_operators_it_serves(sm90: tuple[CompiledModel, Path]) -> None:
    contents = load_artifact(sm90[1])
    served = [(name, step.node) for entry in contents.plan.entries.values() for step in entry.steps for name in step.kernels.values()]
    assert {name for name, _ in served} == set(contents.kernels)
    nodes = {node.name: node for node in contents.graph.nodes}
    assert not [node for _, node in served if node in nodes and not origins(nodes[node])]
    assert {node for _, node in served if node not in nodes} <= {"gather_last"}  # made while planning


def test_weights_are_plain_safetensors(compiled: CompiledModel, saved: Path) -> None:
    tensors = load_file(saved / "weights.safetensors")
    assert set(tensors) == set(compiled.contents.constants)
    assert all(torch.equal(tensors[name], constant.materialize()) for name, constant in compiled.contents.constants.items())


def test_a_loaded_artifact_saves_again_even_onto_itself(artifact: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    loaded = qcompile.load(artifact)
    loaded.save(tmp_path / "other")
    loaded.save(artifact, overwrite=True)
    for root in (artifact, tmp_path / "other"):
        assert {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("family", [*OTHER_FAMILIES, "gpt2", "qwen2_moe"])
def test_families_give_the_same_outputs_after_loading(family: str, tmp_path: Path) -> None:
    inputs = example_inputs(family)
    options = {"example_inputs": inputs} if family in OTHER_FAMILIES else {}
    model = qcompile.compile(tiny(family), "cpu-int8", **options, engine="torch_cpu")  # type: ignore[arg-type]
    model.save(tmp_path / "out")
    loaded = qcompile.load(tmp_path / "out")
    assert not [node.name for node in loaded.graph.nodes if node.op == "call_function" and not origins(node)]
    expected, got = model(**inputs), loaded(**inputs)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


# --- damage


def test_existing_folders_are_overwritten_only_on_request_and_only_artifacts(
    compiled: CompiledModel, artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ArtifactError, match=r"tiny: expected a path that does not exist, got an existing one; choose another, or overwrite"
    ):
        compiled.save(artifact)
    (artifact / "stale").write_text("")
    compiled.save(artifact, overwrite=True)
    assert not (artifact / "stale").exists()
    assert load_artifact(artifact).plan == compiled.contents.plan
    foreign = tmp_path / "documents"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    file = tmp_path / "file"
    file.write_text("")
    for path in (foreign, file):
        with pytest.raises(ArtifactError, match=rf"{path.name}: expected an artifact to overwrite, got something without manifest.json"):
            compiled.save(path, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    compiled.save(tmp_path / "empty", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "empty", "file", "tiny"]


def test_a_path_that_cannot_be_written_is_named(compiled: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file/out: expected a path that can be written, got .*; choose another or make room"):
        compiled.save(tmp_path / "file" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"link: expected a path that does not exist, got an existing one"):
        compiled.save(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_an_interrupted_overwrite_leaves_the_old_artifact(compiled: CompiledModel, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (artifact / "manifest.json").read_bytes()
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if target == artifact and ".tmp-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled.save(artifact, overwrite=True)
    assert (artifact / "manifest.json").read_bytes() == before
    assert load_artifact(artifact).plan == compiled.contents.plan
    assert list(artifact.parent.iterdir()) == [artifact]


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "kernels", "../x", "a/b", ".hidden", "", "x\n"])
def test_assets_have_plain_names_of_their_own(name: str, compiled: CompiledModel, tmp_path: Path) -> None:
    contents = compiled.contents
    assets = type(contents.assets)(files={name: b""})
    own = ArtifactContents(contents.graph, contents.plan, {}, {}, assets, "cpu-int4", "")
    with pytest.raises(ArtifactError, match=r"expected a (plain file name of letters, digits|name that the artifact does not use itself)"):
        save_artifact(tmp_path / "out", own)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_every_file_with_its_hash(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_bytes())
    on_disk = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert set(manifest["files"]) | {"manifest.json", "weights.safetensors"} == on_disk
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((saved / name).read_bytes()).hexdigest()
