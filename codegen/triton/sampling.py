"""The largest logits of a row: each program searches a chunk, a second launch searches what they found; ties go to the lowest index."""

from __future__ import annotations

from qcompile.codegen.triton.contract import ELEMENT_BYTES, FLOATS, TRITON_TYPES, Operator, kernel, pointer, stored
from qcompile.codegen.triton.source import Lines, constants, function, loop
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter, Workspace

CHUNK = 4096
LARGEST_K = 64


def select(count: int, index: str, value_to: str, index_to: str, value_type: str) -> Lines:
    """Take the largest remaining `numbers` one by one.

    What remains is tracked apart from the numbers: a logit may itself be minus infinity.
    """
    step = [
        'largest = tl.max(tl.where(remaining, numbers, float("-inf")), axis=0)',
        "position = tl.min(tl.where(remaining & (numbers == largest), place, BLOCK), axis=0)",
        "chosen = place == position",
        f"chosen_index = tl.sum(tl.where(chosen, {index}, 0), axis=0)",
        f"tl.store({value_to} + choice, largest.to({value_type}))" if value_to else "",
        f"tl.store({index_to} + choice, chosen_index)",
        "remaining = remaining & (place != position)",
    ]
    return [*constants({"COUNT": (count, "numbers to choose")}), *loop("for choice in range(COUNT)", [line for line in step if line])]


def chunk_function(spec: KernelSpec, count: int, chunks: int) -> Lines:
    """Candidates of one chunk of one row, best first."""
    numbers = {
        "N": (spec.size("N"), "logits of a row"),
        "CHUNKS": (chunks, "chunks of a row"),
        "BLOCK": (block_of(spec), "logits of a chunk"),
    }
    body = [
        *constants(numbers),
        "row = tl.program_id(0).to(tl.int64)",
        "place = tl.arange(0, BLOCK)",
        "index = tl.program_id(1) * BLOCK + place",
        "remaining = index < N",
        "numbers = tl.load(logits + row * N + index, mask=remaining, other=0.0).to(tl.float32)",
        # A NaN compares with nothing and would be found by no search; it counts as the least number.
        'numbers = tl.where(numbers == numbers, numbers, float("-inf"))',
        f"at = (row * CHUNKS + tl.program_id(1)) * {count}",
        *select(count, "index", "best + at", "best_index + at", "tl.float32"),
    ]
    return function("search_chunk", ("logits", "best", "best_index"), "One program finds the largest logits of one chunk.", body)


def merge_function(spec: KernelSpec, count: int, chunks: int, result: tuple[str, str]) -> Lines:
    """The best of all candidates: chunks stand in order, so the first among equals is the lowest index."""
    candidates = chunks * count
    values, indices = result
    body = [
        *constants({"CANDIDATES": (candidates, "candidates of a row"), "BLOCK": (power_of_two(candidates), "candidates, padded")}),
        "row = tl.program_id(0).to(tl.int64)",
        "place = tl.arange(0, BLOCK)",
        "remaining = place < CANDIDATES",
        "numbers = tl.load(best + row * CANDIDATES + place, mask=remaining, other=0.0)",
        "index = tl.load(best_index + row * CANDIDATES + place, mask=remaining, other=0)",
        *select(
            count,
            "index.to(tl.int64)",
            f"{values} + row * {count}" if values else "",
            f"{indices} + row * {count}",
            TRITON_TYPES[stored(spec, values)] if values else "",
        ),
    ]
    names = ("best", "best_index", *([values] if values else []), indices)
    return function("merge_chunks", names, "One program finds the largest candidates of one row.", body)


def block_of(spec: KernelSpec) -> int:
    """Logits in a chunk: at least as many as can be asked for.

    A short last chunk then pads its candidates with minus infinity, which no search reaches: the chunks before it have enough.
    """
    return max(LARGEST_K, min(CHUNK, power_of_two(spec.size("N"))))


def emit_sampling(spec: KernelSpec, arch: Architecture) -> Kernel:
    """`argmax` [rows] or `topk` values and indices [rows, k], largest first."""
    count = int(spec.option("k", 1))
    chunks = -(-spec.size("N") // block_of(spec))
    result = ("out", "out1") if spec.operator == "topk" else ("", "out")
    work: tuple[Parameter, ...] = (pointer("best", "fp32"), pointer("best_index", "i32"))
    outputs = tuple(pointer(name, stored(spec, name)) for name in result if name)
    found = ("mul", "rows", chunks * count)
    return kernel(
        spec,
        arch,
        [chunk_function(spec, count, chunks), merge_function(spec, count, chunks, result)],
        [
            Launch(
                "search_chunk",
                ("rows", chunks, 1),
                (pointer("logits", stored(spec, "logits"), 16 if spec.size("N") % 8 == 0 else 1), *work),
            ),
            Launch("merge_chunks", ("rows", 1, 1), (*work, *outputs)),
        ],
        [Workspace("best", ("mul", found, ELEMENT_BYTES["fp32"])), Workspace("best_index", ("mul", found, ELEMENT_BYTES["i32"]))],
    )


def refuses_topk(spec: KernelSpec) -> str | None:
    """A k that is too large, and candidates that one program could not hold."""
    count = int(spec.option("k"))
    if not 1 <= count <= LARGEST_K:
        return f"k={count}: expected 1 to {LARGEST_K}"
    if count > spec.size("N"):
        return f"k={count}: expected at most N={spec.size('N')}"
    if -(-spec.size("N") // CHUNK) * count > 1 << 14:
        return f"k={count}: {spec.size('N')} logits give more candidates than one program holds"
    return None


ARGMAX = Operator(
    emit=emit_sampling,
    operands={"logits": FLOATS, "out": ("i64",)},
    sizes=("N",),
)
TOPK = Operator(
    emit=emit_sampling,
    operands={"logits": FLOATS, "out": FLOATS, "out1": ("i64",)},
    sizes=("N",),
    options=("k",),
    required=("k",),
    refuses=refuses_topk,
)
