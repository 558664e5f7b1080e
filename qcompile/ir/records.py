"""What a compilation leaves beside its graph: the model's text assets, one record per pass, one coverage row per operator."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Assets:
    """What a model carries beside its weights; every field may be empty.

    Attributes:
        files: file name -> content: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json`,
            `config.json`.
        eos_token_ids: all token ids that end a sequence.
        max_positions: the longest sequence the model was made for, 0 if unknown.
        vocab_size: number of logits, 0 if unknown.
        model_type: such as `llama`, or the class name of a plain module.
        name: what the user called the model.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    max_positions: int = 0
    vocab_size: int = 0
    model_type: str = ""
    name: str = ""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, and, where it was checked, what that cost at the outputs on the example inputs.

    Attributes:
        exact: whether it promises to preserve the function; None in records of versions that did not say.
        max_error: max|a-b| / max|b| against the graph before the pass; None where it was not checked.
        sqnr_db: signal over what the pass changed of it, in dB; None where nothing was rounded: exact passes, and lossy ones that
            changed no bit.
        kl: mean KL divergence per token of the next-token distribution from the one before the pass, in nats; of language models and
            lossy passes only.
        total_sqnr_db: like `sqnr_db`, against the graph that came in; of every checked pass.
        total_kl: like `kl`, against the graph that came in; of every checked pass.
    """

    index: int
    name: str
    spec: str
    changed: bool
    nodes_before: int
    nodes_after: int
    seconds: float
    constant_bytes: int
    max_error: float | None = None
    exact: bool | None = None
    sqnr_db: float | None = None
    kl: float | None = None
    total_sqnr_db: float | None = None
    total_kl: float | None = None

    @property
    def checked(self) -> bool:
        """Whether the graph was run before and after this pass."""
        return self.max_error is not None


@dataclass(frozen=True)
class Calibrated:
    """The data that passes ran the model on: token windows, or inputs of a plain module (`length` is 0)."""

    name: str
    key: str
    windows: int
    length: int = 0


@dataclass(frozen=True)
class Settings:
    """What a compilation was told beside target and pipeline: with these the passes can be run again.

    Attributes:
        scheme: as `qcompile.quant.scheme_json` writes it; None in artifacts of versions that did not say.
        calibration: None where no data was read.
        engine: what runs it on CPUs: `native` if it was lowered for C++ kernels, else what the caller chose; None where nothing was
            chosen and nothing could be built, and in artifacts of versions that did not say.
    """

    scheme: dict[str, Any] | None = None
    calibration: Calibrated | None = None
    engine: str | None = None


@dataclass(frozen=True)
class CoverageRow:
    """One linear, embedding, attention, online transform or quantizer: its format and kernel, or why it was left alone (`reason`).

    `activation` is the format of the activations it multiplies or makes, "" where those are floats; of attention what kernels may round
    queries and weights to that meet codes.
    `chosen` says that the scheme or the user left it alone on purpose (the head, an `ignore` pattern), which `strict` accepts.
    """

    node: str
    operator: str
    weight: str
    format: str
    kernel: str
    reason: str
    source: str
    chosen: bool = False
    activation: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that an engine holds, by purpose.

    Attributes:
        weights: constants as this engine multiplies with them (CPU engines unpack some).
        cache_pages: tokens of all sequences, in pages.
        cache_rows: tokens kept as they came, in rows of their sequence.
        page_tables: which pages, and which rows, the sequences of a batch have.
        arena: intermediates of the largest step, and workspaces of kernels.
    """

    weights: int = 0
    cache_pages: int = 0
    cache_rows: int = 0
    page_tables: int = 0
    arena: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.to_dict().values())

    def to_dict(self) -> dict[str, int]:
        """Purpose -> bytes."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def __str__(self) -> str:
        """A line for each purpose, and one for all."""
        rows = {**self.to_dict(), "total": self.total}
        return "\n".join(f"{name:<12} {size:>15,}" for name, size in rows.items())
