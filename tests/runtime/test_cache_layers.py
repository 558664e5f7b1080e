"""The cache of each layer: bytes by hand, neighbours that are alike as one, nothing for a model without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qcompile
from qcompile.runtime.cache_layers import CacheLayer, bits_per_number, folded
from tests.models import tiny

LAYER = CacheLayer(0, "int4 g64 asym", "int4 g64 asym", 0, 0, 128, 72, 0, 0, "reference")


def test_bytes_are_those_of_the_formula() -> None:
    """Two heads of 8: 32 keys of a channel share 4 bytes, a value of a head has its own; 4 + 32 + 31 rows of 16 bits."""
    compiled = qcompile.compile(tiny("llama"), "cpu-fp32-kv4-kivi", max_context=128, engine="torch_cpu")
    first, second = compiled.cache_layers
    assert second == replace(first, layer=1)
    assert (first.keys, first.values, first.sinks, first.window) == ("int4 t32 asym", "int4 g32 asym", 4, 32)
    assert first.numbers_per_token == 2 * 2 * 8
    assert first.bytes_per_token == 2 * ((32 * 8 // 2 + 4 * 8) // 32 + (4 + 4))
    assert first.bytes_per_sequence == 2 * 2 * 67 * 8 * 2
    assert first.table_bytes == 0
    assert first.kernel == "torch_cpu.attend_settled"


def test_options_of_the_cache_reach_it() -> None:
    options = {"cache_keys": "int3 t16 asym", "cache_values": "int2", "cache_sinks": 2, "cache_window": 48}
    layer = qcompile.compile(tiny("llama"), "cpu-fp32-kv4-kivi", max_context=128, **options, engine="torch_cpu").cache_layers[1]
    assert (layer.keys, layer.values, layer.sinks, layer.window) == ("int3 t16 asym", "int2 asym", 2, 48)
    assert layer.bytes_per_token == 2 * ((16 * 8 * 3 // 8 + 4 * 8) // 16 + (2 + 4))
    assert layer.bytes_per_sequence == 2 * 2 * (2 + 48 + 15) * 8 * 2


def test_numbers_as_they_are_computed_take_their_own_bits() -> None:
    (layer, _) = qcompile.compile(tiny("llama"), "cpu-fp32", max_context=64, engine="torch_cpu").cache_layers
    assert (layer.keys, layer.values, layer.bytes_per_token) == ("fp32", "fp32", 2 * 2 * 8 * 4)
    assert layer.bits_per_number == 32


def test_tables_of_a_layer_are_counted_once_for_all_sequences() -> None:
    text = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    (layer, _) = qcompile.compile(tiny("llama"), "cpu-fp32-kv8-static", calibration=text, max_context=64, engine="torch_cpu").cache_layers
    assert layer.table_bytes == 2 * 2 * 8 * 2, "a float16 for each channel of keys and values"
    assert layer.bits_per_number == pytest.approx(8 + 8 * 64 / (32 * 4096))


def test_everything_a_sequence_takes_is_counted() -> None:
    assert LAYER.bits_per_number == 4.5
    assert replace(LAYER, bytes_per_sequence=4096, table_bytes=8192).bits_per_number == pytest.approx(4.5 + 8 * 3 / 128)
    page_table = 8 * 4 / 64  # bits per token, once for all layers
    assert bits_per_number([LAYER, replace(LAYER, bytes_per_token=40)]) == pytest.approx((8 * 112 + page_table) / 256)


def test_neighbours_that_are_alike_are_one() -> None:
    other = replace(LAYER, keys="int2 g64 asym", bytes_per_token=56)
    layers = [replace(LAYER, layer=0), replace(LAYER, layer=1), replace(other, layer=2), replace(LAYER, layer=3)]
    assert [(name, layer.keys) for name, layer in folded(layers)] == [
        ("0-1", "int4 g64 asym"), ("2", "int2 g64 asym"), ("3", "int4 g64 asym"),
    ]  # fmt: skip
    assert list(folded([])) == []


def test_a_model_without_a_cache_has_no_layers() -> None:
    compiled = qcompile.compile(torch.nn.Linear(8, 8), "cpu-fp32", example_inputs=torch.randn(2, 8), engine="torch_cpu")
    assert compiled.cache_layers == []
    assert "bits per number" not in compiled.report()


def test_the_report_shows_the_cache() -> None:
    report = qcompile.compile(tiny("llama"), "cpu-fp32-kv8", max_context=64, engine="torch_cpu").report()
    (line,) = (line for line in report.splitlines() if line.startswith("│ 0-1"))
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells[:9] == ["0-1", "int8 g64 sym", "int8 g64 sym", "0", "0", "40 B", "0 B", "0 B", "10.000"]
