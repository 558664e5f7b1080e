"""A real language model: SmolLM2-135M-Instruct from its GGUF file, beside Hugging Face on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import qcompile
from qcompile.compiled import CompiledModel

PROMPTS = (
    "The capital of France is",
    "In 1969, the first humans",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time there was a compiler",
)
NEW_TOKENS = 30


@pytest.fixture(scope="module")
def compiled(smollm2_gguf: Path) -> CompiledModel:
    return qcompile.compile(smollm2_gguf, "cpu-fp32", max_batch=len(PROMPTS), max_context=128, engine="torch_cpu")


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The same file through transformers' own reader."""
    place = {"pretrained_model_name_or_path": str(smollm2_gguf.parent), "gguf_file": smollm2_gguf.name}
    return transformers.AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32
    ).eval(), transformers.AutoTokenizer.from_pretrained(**place)


def test_thirty_greedy_tokens_and_logits_equal_hugging_face(
    compiled: CompiledModel, reference: tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = reference
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            logits = model(ids).logits[0, -1]
        expected.append(out[0, len(prompt) :].tolist())
        ours = compiled(ids)["logits"][0, -1]
        assert (ours - logits).abs().max() <= 1e-3 * logits.abs().max()
    # One ragged batch through the compiled cache.
    assert compiled.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True) == expected


def test_text_and_chat_go_through_the_models_own_tokenizer(
    compiled: CompiledModel, reference: tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]
) -> None:
    from qcompile.runtime.tokenizer import Tokenizer

    _, tokenizer = reference
    ours = Tokenizer(compiled.assets)
    text = "Größe: naïve 日本語 — 3.14\n\tdef f():"
    assert ours.encode(text) == tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.render_chat(chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "Paris" in compiled.generate(chat, max_new_tokens=20)
    pieces = list(compiled.generate(chat, max_new_tokens=20, stream=True))
    assert len(pieces) > 3
    assert "".join(pieces) == compiled.generate(chat, max_new_tokens=20)
