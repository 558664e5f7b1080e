"""The onnxruntime engine: an artifact's ONNX file on the CPU, past and present bound to memory that stays where it is.

Rows run one after the other, each with a past of its own, so that none depends on who shares the batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.constants import Constant
from qcompile.ir.lowered import Entry
from qcompile.ir.memory import dtype_of
from qcompile.ir.records import MemoryPlan
from qcompile.ir.size import evaluate
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layout import describe, layout_of, state_buffers
from qcompile.runtime.dense_cache import DenseCache, Part
from qcompile.runtime.engines import require_onnxruntime
from qcompile.runtime.engines.base import require_vocabulary, sizes_of, vocabulary_of
from qcompile.runtime.sequences import SequenceEngine, require_cache

SHARED_PAST = "qcompile.shared_past"
"""What the file says in its metadata where the present may be written over the past."""
LOGITS_TO_KEEP = "logits_to_keep"
"""The input, if a file has it, that says how many last tokens get logits; 0 is all, and what it is if nobody says."""
_PAST, _PRESENT = "past_key_values.", "present."
_LOGITS = "logits"
_STATE = re.compile(r"(\d+)\.(key|value)")
_KINDS = {"key": "keys", "value": "values"}
_TYPES = {
    "float": (torch.float32, 1), "uint8": (torch.uint8, 2), "int8": (torch.int8, 3), "int16": (torch.int16, 5), "int32": (torch.int32, 6),
    "int64": (torch.int64, 7), "bool": (torch.bool, 9), "float16": (torch.float16, 10), "double": (torch.float64, 11),
    "bfloat16": (torch.bfloat16, 16), "float8e4m3fn": (torch.float8_e4m3fn, 17),
}  # fmt: skip
"""Type of a tensor as onnxruntime writes it -> torch's, and its number in the ONNX standard (TensorProto.DataType)."""
_NUMBERS = dict(_TYPES.values())


class OnnxRuntimeEngine(SequenceEngine):
    """Runs a file of profile `ort` or `portable` in onnxruntime, on as many threads as torch is set to use."""

    name = "onnxruntime"

    def __init__(
        self, contents: ArtifactContents, model: Path, *, max_batch: int = 1, max_context: int = 2048, page_tokens: int | None = None,
        kv_bytes: int | None = None, share_prefixes: bool = False,
    ) -> None:  # fmt: skip
        """Take an artifact and the ONNX file of its graph; `prepare` reads the file, or the first call.

        Pages count what sequences may hold. A shared beginning is read once and copied, so it saves time and no memory.

        Raises:
            CapacityError: if the cache has no room for a page for each row.
            EngineError: without onnxruntime.
        """
        super().__init__()
        require_onnxruntime()
        self.contents, self.model, self.max_batch, self.share_prefixes = contents, model, max_batch, share_prefixes
        entries = contents.plan.entries
        self._forward = entries["forward"]
        self._layout = layout_of(
            entries.get("decode"), max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes
        )
        self.max_context = self._layout.capacity
        if "decode" in entries:
            self.chunk = entries["prefill"].limits["sequence"]
        self.vocabulary = vocabulary_of(self._forward)
        self._session: Any = None
        self._binding: Any = None
        self._cache: DenseCache | None = None
        self._mask = torch.ones(1, 0, dtype=torch.int64)
        self._bound: Mapping[str, Tensor] | None = None
        self._width, self._logits_dtype = 0, torch.float32
        self._counts: dict[int, Tensor] = {}

    def prepare(self) -> None:
        """Read the file.

        Raises:
            EngineError: if onnxruntime cannot run it.
        """
        if self._session is not None:
            return
        session = _session(self.model)
        self._require_interface(session)
        if "decode" in self.contents.plan.entries:
            parts = [_part(given) for given in session.get_inputs() if given.name.startswith(_PAST)]
            shared = session.get_modelmeta().custom_metadata_map.get(SHARED_PAST) == "1"
            self._cache = DenseCache(self._layout, self._named(parts), shared=shared)
            self._mask = torch.ones(1, self.max_context, dtype=torch.int64)
            logits = session.get_outputs()[0]
            self._width, self._logits_dtype = int(logits.shape[-1]), _type(logits)
            if any(item.name == LOGITS_TO_KEEP for item in session.get_overridable_initializers()):
                self._counts = {count: torch.tensor([count]) for count in (0, 1)}
        self._session, self._binding = session, session.io_binding()

    def _require_interface(self, session: Any) -> None:
        """Refuse the file of another model."""
        given, made = ([item.name for item in items] for items in (session.get_inputs(), session.get_outputs()))
        if "decode" in self.contents.plan.entries:
            past = [item for item in session.get_inputs() if item.name.startswith(_PAST)]
            sized = all(len(item.shape) == 4 and isinstance(item.shape[1], int) and isinstance(item.shape[3], int) for item in past)
            wanted = ["input_ids", "attention_mask", *(item.name for item in past)]
            results = [_LOGITS, *(item.name.replace(_PAST, _PRESENT, 1) for item in past)]
            fits = sized and sorted(given) == sorted(wanted) and made == results and isinstance(session.get_outputs()[0].shape[-1], int)
        else:
            fits = set(given) <= set(self._forward.inputs) and len(made) == len(self._forward.outputs)
        if not fits:
            raise EngineError(
                f"engine onnxruntime: {self.model}: expected the ONNX file of this model, got one that takes {', '.join(given[:6])} "
                f"and gives {', '.join(made[:6])}; save the artifact again"
            )

    def _named(self, parts: Sequence[Part]) -> list[Part]:
        """Parts under the names of the plan's buffers, if they are numbers as there: then other engines read what this one saves."""
        buffers = {state.name: state for state in state_buffers(self.contents.plan.entries["decode"])}
        named = [Part(_buffer_name(part.name), part.dtype, part.heads, part.size) for part in parts]
        alike = len(named) == len(buffers) and all(
            part.name in buffers
            and part.dtype.is_floating_point
            and (dtype_of(buffers[part.name].dtype), *buffers[part.name].shape[1::2]) == (part.dtype, part.heads, part.size)
            for part in named
        )
        return named if alike else list(parts)

    @property
    def cache(self) -> DenseCache:
        """The past of all rows."""
        self.prepare()
        return require_cache(self._cache)

    @property
    def model_constants(self) -> Mapping[str, Constant]:
        """The artifact's."""
        return self.contents.constants

    @property
    def cache_format(self) -> str:
        """As the plan has it, if it is stored as there."""
        words = describe(self.contents.plan.entries["decode"])
        own = any(part.name.startswith(_PAST) for part in self.cache.parts)
        return f"{words}, as past of an ONNX file" if own else words

    @property
    def memory(self) -> MemoryPlan:
        """Bytes by purpose: of the file, of the past that rows have, and as `arena` of what the next present is written to."""
        self.prepare()
        weights = sum(file.stat().st_size for file in self.model.parent.glob(f"{self.model.name}*"))
        cache = self._cache
        return MemoryPlan(weights, cache.row_bytes if cache else 0, 0, 0, cache.spare_bytes if cache else 0)

    def compute(self, name: str, rows: Sequence[int], ids: Tensor, positions: Tensor) -> Tensor:
        """Each row by itself: the last logits [n, V]; zeros where a row has no token."""
        del name
        logits = torch.zeros(len(rows), self._width, dtype=self._logits_dtype)
        for place, count in enumerate((positions >= 0).sum(dim=1).tolist()):
            if count:
                logits[place] = self._advance_row(rows[place], ids[place, :count])
        return logits

    def _advance_row(self, row: int, ids: Tensor) -> Tensor:
        """Tokens [S] behind what a row holds: the last logits [V]."""
        cache, count = self.cache, len(ids)
        logits = self._run(ids, cache.lengths[row] + count, cache.past(row), cache.present(row, count), last=True)
        cache.keep(row, count)
        return logits[0, -1]

    def _run(
        self, ids: Tensor, total: int, past: Mapping[str, Tensor], present: Mapping[str, Tensor], *, last: bool = False
    ) -> Tensor:  # fmt: skip
        """Logits [1, S, V] after tokens [S], which are the last of `total`; with `last` [1, 1, V], where the file can do that."""
        ids = ids.contiguous().view(1, -1)
        alone = last and bool(self._counts)
        logits = torch.empty(1, 1 if alone else ids.shape[1], self._width, dtype=self._logits_dtype)
        if self._counts:
            self._bind_input(LOGITS_TO_KEEP, self._counts[int(alone)])
        self._bind_input("input_ids", ids)
        self._bind_input("attention_mask", self._ones(total))
        self._bind_output(_LOGITS, logits)
        if past is not self._bound:
            for name, tensor in past.items():
                self._bind_input(f"{_PAST}{_plain(name)}", tensor)
                self._bind_output(f"{_PRESENT}{_plain(name)}", present[name])
        self._bound = past if past is present else None
        self._session.run_with_iobinding(self._binding)
        return logits

    def _ones(self, total: int) -> Tensor:
        if self._mask.shape[1] < total:
            self._mask = torch.ones(1, total, dtype=torch.int64)
        return self._mask[:, :total]

    def _bind_input(self, name: str, tensor: Tensor) -> None:
        self._binding.bind_input(name, "cpu", 0, _NUMBERS[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    def _bind_output(self, name: str, tensor: Tensor) -> None:
        self._binding.bind_output(name, "cpu", 0, _NUMBERS[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs on inputs by name; a model with a cache is given an empty one and runs row by row, padding gives zeros.

        Raises:
            EngineError: for an input that is missing or has another number of axes, a token that the model does not know, or positions
                that do not count the tokens of a row.
        """
        self.prepare()
        sizes = sizes_of(self._forward, inputs)
        if self._cache is not None:
            return [self._logits(inputs["input_ids"], inputs.get("positions"))]
        results = [_allocated(self._forward, name, sizes) for name in self._forward.outputs]
        given = {item.name: inputs[item.name].to(_type(item)).contiguous() for item in self._session.get_inputs()}
        for name, tensor in given.items():
            self._bind_input(name, tensor)
        for item, tensor in zip(self._session.get_outputs(), results, strict=True):
            self._bind_output(item.name, tensor)
        self._session.run_with_iobinding(self._binding)
        return results

    def _logits(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Logits [B, S, V] of sequences from their beginning."""
        require_vocabulary("forward", ids, self.vocabulary)
        batch, length = ids.shape
        wanted = torch.arange(length).repeat(batch, 1) if positions is None else positions
        real = wanted >= 0
        counted = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        if not torch.equal(wanted, counted):
            raise EngineError(
                f"forward: positions: expected 0, 1, 2 … over the tokens of each row and -1 at padding, got {wanted.tolist()[0][:8]} …; "
                "leave them out"
            )
        logits = torch.zeros(batch, length, self._width, dtype=self._logits_dtype)
        for row in range(batch):
            if bool(real[row].any()):
                tokens = ids[row][real[row]]
                logits[row, real[row]] = self._run(tokens, len(tokens), *self._empty(len(tokens)))[0]
        return logits

    def _empty(self, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """No past, and memory for a present of `count` tokens."""
        scratch = DenseCache(
            layout_of(self.contents.plan.entries["decode"], max_batch=1, max_context=count), self.cache.parts, shared=self.cache.shared
        )
        scratch.reserve([count], [0])
        return scratch.past(0), scratch.present(0, count)


def _session(model: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Without this a fused product of packed weights rounds activations to 8 bits, which the graph does not.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base
        raise EngineError(
            f"engine onnxruntime: {model}: expected a file that onnxruntime {onnxruntime.__version__} runs on a CPU, got: "
            f"{str(error).splitlines()[0]}; use another engine, or compile for another scheme"
        ) from error


def _type(item: Any) -> torch.dtype:
    """Torch's name for the type of an input or output."""
    return _TYPES[item.type.removeprefix("tensor(").removesuffix(")")][0]


def _part(given: Any) -> Part:
    _, heads, _, size = given.shape
    return Part(given.name, _type(given), int(heads), int(size))


def _buffer_name(name: str) -> str:
    """`keys_0` for `past_key_values.0.key`, the name itself for others."""
    match = _STATE.fullmatch(name.removeprefix(_PAST))
    return f"{_KINDS[match[2]]}_{match[1]}" if match else name


def _plain(name: str) -> str:
    """`0.key` for `keys_0` or for `past_key_values.0.key`."""
    kind, _, number = name.partition("_")
    found = {stored: key for key, stored in _KINDS.items()}.get(kind)
    return f"{number}.{found}" if found else name.removeprefix(_PAST)


def _allocated(entry: Entry, name: str, sizes: Mapping[str, int]) -> Tensor:
    buffer = entry.buffers[name]
    return torch.empty([evaluate(size, sizes) for size in buffer.shape], dtype=dtype_of(buffer.dtype))
