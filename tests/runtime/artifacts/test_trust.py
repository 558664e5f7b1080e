"""Native code runs only where somebody vouched for it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import UntrustedCodeError
from qcompile.runtime.artifact import load_artifact, save_artifact
from tests.models import tiny
from tests.runtime.artifacts.tampering import PROMPTS, flip, reseal


def test_native_code_that_nobody_vouched_for_is_not_run(sm90: tuple[CompiledModel, Path]) -> None:
    _, path = sm90
    assert not load_artifact(path).native_allowed
    with pytest.raises(
        UntrustedCodeError, match=r"expected kernels built on this machine, got \d+ that were not \(\w+\.cubin\); if you trust"
    ):
        qcompile.load(path, engine="cuda")
    with pytest.warns(
        UserWarning, match=r"tiny: compiled for sm90-int4, served by reference: .*(no CUDA device|not built on this machine)"
    ):
        assert qcompile.load(path).engine.name == "reference"


def test_untrusted_kernels_are_served_by_reference_where_there_is_a_device(
    sm90: tuple[CompiledModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(
        UserWarning, match=r"served by reference: \d+ kernels were not built on this machine \(allow_native=True runs them\)"
    ):
        assert qcompile.load(sm90[1]).engine.name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcompile.load(sm90[1], allow_native=True)


def test_native_code_is_allowed_by_the_caller_or_because_it_was_built_here(sm90: tuple[CompiledModel, Path], tmp_path: Path) -> None:
    model, path = sm90
    allowed = load_artifact(path, allow_native=True)
    allowed.require_native()
    save_artifact(tmp_path / "copy", allowed)
    assert not load_artifact(tmp_path / "copy").native_allowed, "allowed once is not built here"
    model.save(tmp_path / "own")
    load_artifact(tmp_path / "own").require_native()
    load_artifact(path).require_native()


def test_a_changed_cubin_is_not_trusted_though_its_hash_is_right(sm90: tuple[CompiledModel, Path], tmp_path: Path) -> None:
    sm90[0].save(tmp_path / "own")
    cubin = sorted((tmp_path / "own" / "kernels").glob("*.cubin"))[0]
    flip(cubin, 100)
    reseal(tmp_path / "own", f"kernels/{cubin.name}")
    assert load_artifact(tmp_path / "own").untrusted == (cubin.name,)


def test_native_code_in_an_artifact_for_cpus_stays_where_it_is(artifact: Path) -> None:
    (artifact / "kernels" / "own.cubin").write_bytes(b"\x7fELF")
    reseal(artifact, "kernels/own.cubin")
    assert load_artifact(artifact).untrusted == ("own.cubin",)
    assert qcompile.load(artifact, max_batch=3, max_context=32).generate(PROMPTS, max_new_tokens=1, ignore_eos=True)


def test_an_artifact_for_a_gpu_gives_its_tokens_here(sm90: tuple[CompiledModel, Path]) -> None:
    model, path = sm90
    with pytest.warns(UserWarning, match="served by reference"):
        loaded = qcompile.load(path, max_batch=3, max_context=64)
    in_memory = CompiledModel(model.contents, max_batch=3, max_context=64, engine="reference")
    same_scheme = qcompile.compile(tiny("llama"), "reference-int4", max_batch=3, max_context=64)
    got = loaded.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    assert got == in_memory.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    assert {tensor.dtype for tensor in loaded.engine.cache.tensors.values()} == {torch.bfloat16}  # type: ignore[attr-defined]
    ids = torch.tensor([PROMPTS[0]])
    ours, theirs = loaded(ids)["logits"].float(), same_scheme(ids)["logits"].float()
    assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max()


# --- writing
