"""The accuracy table's own parts: the second basis is the same function, and a failed entry says so."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy_model import orthogonal, rotate
from benchmarks.accuracy_ours import OURS
from benchmarks.accuracy_peers import PEERS, _set_block_size
from tests.models import example_inputs, tiny


def test_the_second_basis_is_the_same_function_with_other_weights() -> None:
    model, inputs = tiny("llama"), example_inputs("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
        weights = model.state_dict()
        before = weights["model.layers.0.self_attn.q_proj.weight"].clone()
        rotate(weights, orthogonal(32, seed=3))
        model.load_state_dict(weights)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert (weights["model.layers.0.self_attn.q_proj.weight"] - before).abs().max() > 0.1


def test_a_basis_is_orthogonal_and_its_seed_chooses_it() -> None:
    basis = orthogonal(24, seed=1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(24, dtype=torch.float64))
    assert torch.equal(basis, orthogonal(24, seed=1))
    assert not torch.equal(basis, orthogonal(24, seed=2))


def test_every_entry_of_the_table_exists() -> None:
    for row in accuracy.ROWS.values():
        assert set(row.ours) <= set(OURS)
        assert set(row.peers) <= set(PEERS)


def test_presets_of_other_groups_are_set_to_ours() -> None:
    preset = {"quant_cfg": [{"block_sizes": {-1: 128, "type": "static"}, "num_bits": 4}, {-1: 16}]}
    _set_block_size(preset)
    assert preset == {"quant_cfg": [{"block_sizes": {-1: 64, "type": "static"}, "num_bits": 4}, {-1: 16}]}


def test_an_entry_that_fails_stands_in_the_table_with_its_message(tmp_path: Path) -> None:
    options = argparse.Namespace(calib=tmp_path / "no.npy", eval=None, windows=None)
    result = accuracy.run_entry(sys.executable, "peers", "hqq-w4", options, tmp_path, tmp_path)
    assert isinstance(result, str)
    assert accuracy._line("hqq-w4", result).startswith("| hqq-w4 | failed: FileNotFoundError")


def test_a_line_holds_what_was_measured() -> None:
    measured = {"bits": 4.25, "kl": 0.12341, "perplexity": 40.126, "seconds": 12.4, "peak_mb": 1500.2}
    assert accuracy._line("x", measured) == "| x | 4.25 | 0.1234 | 40.13 | 12 | 1500 |"


@pytest.mark.parametrize("name", OURS)
def test_commands_name_what_makes_them(name: str) -> None:
    command = OURS[name].command("MODEL", "c.npy")
    assert command.startswith(f'qcompile.compile("MODEL", "{OURS[name].target}", calibration="c.npy"')
    assert all(f"{key}={value!r}" in command for key, value in OURS[name].options.items())
