"""Requests that arrive while others are being answered: they join the batch, share it, and leave when they are done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.compiled import CompiledModel

ROWS, PAGE_TOKENS = 3, 16


@dataclass
class Request:
    """A prompt that arrives at a step and wants so many tokens."""

    name: str
    arrives: int
    prompt: list[int]
    wants: int
    tokens: list[int] = field(default_factory=list)


def requests() -> list[Request]:
    """Two that begin alike, a long one, and two short ones."""
    alike = list(range(10, 42))
    return [
        Request("a", 0, [*alike, 3], 9), Request("b", 1, [*alike, 4, 5], 6), Request("c", 2, list(range(3, 73)), 12),
        Request("d", 3, [7, 8], 4), Request("e", 3, [9], 8),
    ]  # fmt: skip


def model() -> CompiledModel:
    """A tiny language model with random weights, its keys and values in 8 bits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=256, **sizes)).eval()
    compiled = qcompile.compile(source, "cpu-int4-kv8", recipe="nearest", max_context=64)
    return CompiledModel(compiled.contents, max_batch=ROWS, page_tokens=PAGE_TOKENS, kv_bytes=12 * 1024, share_prefixes=True)


def serve(compiled: CompiledModel, wanted: list[Request]) -> int:
    """Greedy answers; the number of steps. Each line shows who is in the batch."""
    engine = compiled.engine
    waiting, running, step = deque(wanted), dict[int, Request](), 0
    while waiting or running:
        while waiting and waiting[0].arrives <= step and engine.has_room([len(waiting[0].prompt)]):
            request = waiting.popleft()
            row, logits = engine.join(request.prompt)
            request.tokens.append(int(logits.argmax()))
            running[row] = request
        if running:
            logits = engine.step({row: request.tokens[-1] for row, request in running.items()})
            for request, token in zip(running.values(), logits.argmax(-1).tolist(), strict=True):
                request.tokens.append(token)
        print(f"step {step:2}: {' '.join(request.name for request in running.values()):<6} tokens stored: {engine.state}")
        for row in [row for row, request in running.items() if len(request.tokens) >= request.wants]:
            engine.leave(row)
            del running[row]
        step += 1
    return step


def main() -> None:
    """Serve the requests, then each one alone, and compare."""
    compiled, wanted = model(), requests()
    print(f"{compiled.max_context} tokens at most, {compiled.kv_bytes_per_token} bytes each\n\n{compiled.memory_plan}\n")
    steps = serve(compiled, wanted)
    alone = [compiled.generate([request.prompt], max_new_tokens=request.wants, ignore_eos=True)[0] for request in wanted]
    print(f"\n{steps} steps in place of {sum(request.wants for request in wanted)}")
    print(f"the same tokens as alone: {[request.tokens[: request.wants] for request in wanted] == alone}")


if __name__ == "__main__":
    main()
