"""Every format of the cache: token by token, in chunks and at once, a sequence sees the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.evaluation import evaluate, logits_of
from qcompile.quant.cache_format import CACHES
from qcompile.target import parse_target
from tests.models import tiny

TEXT = torch.randint(0, 100, (1, 110), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(0, 100, (8, 64), generator=torch.Generator().manual_seed(1))
PROMPT = 60
"""Shorter than what formats keep as it came, which the text is not."""


@pytest.fixture(scope="module", params=sorted(CACHES.keys() - {"kv"}))
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    torch.manual_seed(0)
    options = {"cache_bits": 7.0} if request.param == "kv-mixed" else {}  # heads of 8 numbers take more bits for their scales
    return qcompile.compile(
        tiny("llama"), f"cpu-fp32-{request.param}", calibration=CALIBRATION, max_context=128, max_batch=2, **options, engine="torch_cpu"
    )


def by_decoding(compiled: CompiledModel, engine: str) -> Tensor:
    """Logits [51, V] of the prompt's last token and of those that follow one by one."""
    model = CompiledModel(compiled.contents, max_batch=1, max_context=128, engine=engine)
    first = model.engine.prefill([TEXT[0, :PROMPT].tolist()])
    return torch.cat([first, *(model.engine.decode([token]) for token in TEXT[0, PROMPT:].tolist())])


@pytest.mark.parametrize("engine", ["reference", "torch_cpu"])
def test_decoding_gives_what_reading_the_text_at_once_gives(compiled: CompiledModel, engine: str) -> None:
    at_once = CompiledModel(compiled.contents, max_batch=1, max_context=128, engine=engine)(input_ids=TEXT)["logits"][0, PROMPT - 1 :]
    torch.testing.assert_close(by_decoding(compiled, engine), at_once, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(CACHES))
def test_evaluation_scores_what_decoding_would_have_seen(name: str) -> None:
    """Log-probabilities of the tokens that follow, from the first token of windows side by side.

    In float64, unsettled tokens too: no number lies so close to the border of two codes that the order of a sum decides, and a group
    that has seen the future shows.
    """
    scheme = parse_target(f"cpu-fp32-{name}" if name != "kv" else "cpu-fp32").scheme
    cache = replace(scheme.cache, dtype=torch.float64, bits=7.0 if scheme.cache.bits else 0.0)
    scheme = replace(scheme, cache=cache, compute=torch.float64)
    compiled = qcompile.compile(tiny("llama"), "cpu-fp32", scheme=scheme, calibration=CALIBRATION, max_context=128, engine="torch_cpu")
    model = CompiledModel(compiled.contents, max_batch=2, max_context=128, engine="reference")
    windows = torch.cat((TEXT, TEXT.flip(1)))
    first = model.engine.prefill(windows[:, :1].tolist())
    steps = torch.stack([first, *(model.engine.decode(tokens.tolist()) for tokens in windows[:, 1:-1].T)], dim=1)
    at_once, decoded = _of_next(logits_of(model)(windows)[:, :-1], windows), _of_next(steps, windows)
    torch.testing.assert_close(at_once, decoded, rtol=0, atol=1e-9)
    result = evaluate(logits_of(model), windows)
    assert result.tokens == decoded.numel() == 218
    assert result.perplexity == pytest.approx(float((-decoded.mean()).exp()), rel=1e-9)


def _of_next(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability [B, S - 1] of each token but the first, from the logits [B, S - 1, V] before it."""
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)


def test_rows_of_a_ragged_batch_are_what_they_are_alone(compiled: CompiledModel) -> None:
    model = CompiledModel(compiled.contents, max_batch=2, max_context=128, engine="reference")
    prompts, steps = [TEXT[0, :70].tolist(), TEXT[0, 30:50].tolist()], TEXT[0, 70:75].tolist()
    together = [model.engine.prefill(prompts), *(model.engine.decode([token, token]) for token in steps)]
    for row, prompt in enumerate(prompts):
        alone = CompiledModel(compiled.contents, max_batch=1, max_context=128, engine="reference")
        expected = [alone.engine.prefill([prompt]), *(alone.engine.decode([token]) for token in steps)]
        assert all(torch.equal(found[row], logits[0]) for found, logits in zip(together, expected, strict=True))


def test_the_bytes_are_those_that_are_allocated(compiled: CompiledModel) -> None:
    cache = CompiledModel(compiled.contents, max_batch=2, max_context=128).engine.cache  # type: ignore[attr-defined]
    allocated = sum(tensor.nbytes for tensor in cache.tensors.values())
    assert cache.nbytes == allocated == 2 * (128 * compiled.kv_bytes_per_token + compiled.kv_bytes_per_sequence)


def test_layers_take_together_what_the_cache_takes(compiled: CompiledModel) -> None:
    layers = compiled.cache_layers
    assert [layer.layer for layer in layers] == [0, 1]
    assert sum(layer.bytes_per_token for layer in layers) == compiled.kv_bytes_per_token
    assert sum(layer.bytes_per_sequence for layer in layers) == compiled.kv_bytes_per_sequence
    cache = compiled.target.scheme.cache
    assert {(layer.sinks, layer.window) for layer in layers} == {(cache.sinks, cache.window)}
    keys, values = cache.forms() or ("fp16", "fp16")
    if cache.rematerialized:
        keys, values = f"made from {keys}", f"made from {values}"
    elif cache.before_positions:
        keys = f"{keys}, before positions"
    if not cache.bits:
        assert {(layer.keys, layer.values) for layer in layers} == {(keys, values)}


def test_padding_may_stand_anywhere(compiled: CompiledModel) -> None:
    model = CompiledModel(compiled.contents, max_batch=1, max_context=128, engine="reference")
    ids, positions = torch.zeros(1, 220, dtype=torch.long), torch.full((1, 220), -1)
    places = torch.arange(110) * 2 + (torch.arange(110) > 40)  # a gap after each token, two after one of them
    ids[0, places], positions[0, places] = TEXT[0], torch.arange(110)
    found = model.engine.forward({"input_ids": ids, "positions": positions})[0][0, places]
    torch.testing.assert_close(found, model(input_ids=TEXT)["logits"][0], rtol=0, atol=2e-5)
