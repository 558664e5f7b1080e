"""Graph -> ONNX -> graph: every family of the contract tests comes back as the same function, language models with a cache of their own."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")

import qcompile
from tests.models import CAUSAL_FAMILIES, OTHER_FAMILIES, VOCABULARY, example_inputs, tiny

CLOSE = 1e-5
"""Of logits in float32, relative to the largest: the order of sums differs, nothing else."""
NEW_TOKENS = 6
WRITTEN = {"mistral": ("ort", 23), "gemma2": ("ort", 21), "gpt2": ("ort", 21), "phi3": ("portable", 23), "gemma3": ("portable", 23)}
"""Family -> profile and opset of its file; the others' are ("portable", 21), where attention is written by its parts."""
TEXT = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


def padded(ids: Tensor) -> dict[str, Tensor]:
    """The same with three tokens of padding before the first row."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def exported(family: str, folder: Path, profile: str, opset: int) -> Path:
    model = qcompile.compile(tiny(family), "cpu-fp32", max_context=64, max_batch=2, engine="torch_cpu")
    return model.export_onnx(folder / f"{family}.onnx", profile=profile, opset=opset).path


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_language_models_come_back_and_are_compiled_with_a_cache_again(family: str, tmp_path: Path) -> None:
    """Longer than the windows of 5 tokens; logits of padded rows and greedy tokens through the new cache are transformers' own."""
    profile, opset = WRITTEN.get(family, ("portable", 21))
    path, model = exported(family, tmp_path, profile, opset), tiny(family)
    again = qcompile.compile(path, "cpu-fp32", max_context=64, max_batch=2, engine="torch_cpu")
    assert again.is_causal_lm
    inputs = padded(TEXT)
    with torch.no_grad():
        expected = model(**inputs).logits
        greedy = model.generate(
            TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    real = inputs["attention_mask"] != 0
    assert (again(**inputs)["logits"] - expected)[real].abs().max() <= CLOSE * expected.abs().max()
    found = again.generate([row.tolist() for row in TEXT], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert found == greedy[:, TEXT.shape[1] :].tolist()


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_models_come_back(family: str, tmp_path: Path) -> None:
    inputs = example_inputs(family)
    model = qcompile.compile(tiny(family), "cpu-fp32", example_inputs=inputs, engine="torch_cpu")
    path = model.export_onnx(tmp_path / "m.onnx", opset=21).path
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody takes them for language models
        again = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    larger = example_inputs(family, batch=3, size=9, seed=4)
    found, expected = again(**larger), model(**larger)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= CLOSE * value.abs().max()
