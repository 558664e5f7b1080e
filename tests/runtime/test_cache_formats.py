"""Every format of the cache: token by token, in chunks and at once, a sequence sees the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.quant.scheme import CACHES
from tests.models import tiny

TEXT = torch.arange(7, 19).unsqueeze(0)


@pytest.fixture(scope="module", params=sorted(CACHES.keys() - {"kv"}))
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    torch.manual_seed(0)
    return qcompile.compile(tiny("llama"), f"cpu-fp32-{request.param}", max_context=32, max_batch=2)


def by_decoding(compiled: CompiledModel, engine: str) -> Tensor:
    """Logits [8, V] of the last tokens, one by one after a prompt of five."""
    model = CompiledModel(compiled.contents, max_batch=1, max_context=32, engine=engine)
    first = model.engine.prefill([TEXT[0, :5].tolist()])
    return torch.cat([first, *(model.engine.decode([token]) for token in TEXT[0, 5:].tolist())])


@pytest.mark.parametrize("engine", ["reference", "torch_cpu"])
def test_decoding_gives_what_reading_the_text_at_once_gives(compiled: CompiledModel, engine: str) -> None:
    at_once = CompiledModel(compiled.contents, max_batch=1, max_context=32, engine=engine)(input_ids=TEXT)["logits"][0, 4:]
    torch.testing.assert_close(by_decoding(compiled, engine), at_once, rtol=0, atol=2e-5)
