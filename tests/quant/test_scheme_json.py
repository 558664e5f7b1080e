"""Schemes come back from JSON as they were."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qcompile.errors import FormatError
from qcompile.quant.cache_format import CACHES
from qcompile.quant.scheme import SCHEMES, W4A8
from qcompile.quant.scheme_json import scheme_from_json, scheme_to_json


def test_every_preset_and_cache_comes_back() -> None:
    changed = W4A8.with_options(group_size=32, activation_clip=0.9, ignore=["a", "re:b"], quantize_head=True)
    fast = SCHEMES["int4"].with_options(matmul="fast", weight_format="int4 g32 min fp16", head_format="int8 channel sym fp16")
    for scheme in (*SCHEMES.values(), *(replace(W4A8, cache=cache) for cache in CACHES.values()), changed, fast):
        assert scheme_from_json(json.loads(json.dumps(scheme_to_json(scheme)))) == scheme


@pytest.mark.parametrize("key", ["cache", "weight", "activation"])
def test_other_values_are_refused(key: str) -> None:
    with pytest.raises(FormatError, match="expected"):
        scheme_from_json(scheme_to_json(W4A8) | {key: "int99"})
