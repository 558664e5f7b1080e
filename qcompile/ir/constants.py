"""Constants as handles: where the bytes are, and what has been done to them since. One is materialised at a time.

So a model of any size is traced, transformed and written without ever standing in memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qcompile.errors import UnboundConstantError
from qcompile.quant.reference import Quantized, part_dtype, part_shape, quantize
from qcompile.quant.rounding.mse_clip import mse_clip
from qcompile.quant.scheme import QuantFormat, dtype_name


class Source(Protocol):
    """Where a constant's bytes come from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, known without reading it."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype, known without reading it."""

    @property
    def key(self) -> str:
        """What tells this source from every other: a place, not a hash of the bytes."""

    def load(self) -> Tensor:
        """Read the tensor; nothing is kept."""


@dataclass(frozen=True, eq=False)
class TensorSource:
    """A tensor that is in memory already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tensor.dtype

    @property
    def key(self) -> str:
        """Small tensors by value, so that equal ones are one; large ones by place. Shape and dtype tell views of one memory apart."""
        form = f"{dtype_name(self.tensor.dtype)}{list(self.tensor.shape)}"
        if self.tensor.numel() <= 4096 and self.tensor.device.type == "cpu":
            flat = self.tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            return f"value:{form}:{hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"
        return f"memory:{form}:{self.tensor.data_ptr():x}:{self.tensor.stride()}"

    def load(self) -> Tensor:
        """The tensor itself, or its copy on the CPU."""
        return self.tensor.detach().cpu()


@dataclass(frozen=True)
class SafetensorsSource:
    """One tensor of a safetensors file, mapped and not read until asked for."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """File and name."""
        return f"safetensors:{self.path.name}:{self.name}"

    def load(self) -> Tensor:
        """Read this one tensor."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class UnboundSource:
    """A constant of a model traced without weights: its shape is known, its bytes are nowhere."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """The name."""
        return f"unbound:{self.name}"

    def load(self) -> Tensor:
        """There is nothing to load."""
        raise UnboundConstantError(
            f"{self.name}: expected a value, got none: the model was traced from its configuration alone; give a checkpoint with weights"
        )


LAZY_METHODS: dict[str, Callable[[Tensor, QuantFormat, str], Quantized]] = {
    "nearest": quantize,
    "mse-clip": lambda weight, form, name: mse_clip(weight, form, name=name),
}
"""How a weight is rounded that is looked at alone."""


@dataclass(eq=False)
class Rounding:
    """The one quantization behind the codes, scales and zero points of a weight: computed once for all."""

    weight: Constant
    form: QuantFormat
    name: str
    method: str = "nearest"
    _result: Quantized | None = field(default=None, repr=False)
    _taken: set[str] = field(default_factory=set, repr=False)

    def part(self, part: str) -> Tensor:
        """The tensor called `part`; the result is freed once each part has been taken."""
        if self._result is None:
            self._result = LAZY_METHODS[self.method](self.weight.materialize(), self.form, self.name)
            self._taken.clear()
        tensor: Tensor = getattr(self._result, part)
        self._taken.add(part)
        if self._taken >= set(self.form.parts):
            self._result = None
        return tensor


@dataclass(frozen=True, eq=False)
class RoundedSource:
    """Codes, scale or zero point of a quantized weight [N, K]."""

    rounding: Rounding
    part: str

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, ceil(K·b/8)] for codes, [N, G] for scales, [N, ceil(G·b/8)] for zero points, [N, H] or [1, 1] for the second level."""
        rows, columns = self.rounding.weight.shape
        return part_shape(self.rounding.form, self.part, rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or the format's scale dtypes."""
        return part_dtype(self.rounding.form, self.part)

    @property
    def key(self) -> str:
        """The weight's own key and what was done to it."""
        return f"{self.rounding.weight.key}|{self.text}"

    @property
    def text(self) -> str:
        """What was done to the weight: `quantize(int4 g64 sym fp16).codes`."""
        method = "" if self.rounding.method == "nearest" else f", {self.rounding.method}"
        return f"quantize({self.rounding.form}{method}).{self.part}"

    def load(self) -> Tensor:
        """Round the weight, or take the part from the rounding its siblings caused."""
        return self.rounding.part(self.part)


class Transform(Protocol):
    """One entry of a constant's log: a frozen dataclass whose `str` is what the log shows."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape after."""

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype after."""

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor after."""


@dataclass(frozen=True)
class Cast:
    """To another dtype."""

    to: torch.dtype

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The new dtype."""
        return self.to

    def apply(self, tensor: Tensor) -> Tensor:
        """Rounded to nearest."""
        return tensor.to(self.to)

    def __str__(self) -> str:
        return f"cast({dtype_name(self.to)})"


@dataclass(frozen=True)
class Permute:
    """Axes in another order; `order=(1, 0)` transposes a matrix."""

    order: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes in the new order."""
        return tuple(shape[axis] for axis in self.order)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Unchanged."""
        return dtype

    def apply(self, tensor: Tensor) -> Tensor:
        """Contiguous in the new order."""
        return tensor.permute(self.order).contiguous()

    def __str__(self) -> str:
        return f"permute{self.order}"


@dataclass(frozen=True)
class Reshape:
    """The same elements in another shape."""

    to: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The new shape."""
        return self.to

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Unchanged."""
        return dtype

    def apply(self, tensor: Tensor) -> Tensor:
        """A view where there is one."""
        return tensor.reshape(self.to)

    def __str__(self) -> str:
        return f"reshape{self.to}"


@dataclass(frozen=True, eq=False)
class Constant:
    """A source and the log of what happens to its tensor between there and the graph.

    `format` is what the printer shows for a quantized part, None for a plain tensor. `history` tells what was done to the tensor before it
    became this source, such as before it was stored; unlike the transforms it is for readers only.
    """

    source: Source
    transforms: tuple[Transform, ...] = ()
    format: QuantFormat | None = None
    history: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after all transforms."""
        shape = self.source.shape
        for transform in self.transforms:
            shape = transform.shape(shape)
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype after all transforms."""
        dtype = self.source.dtype
        for transform in self.transforms:
            dtype = transform.dtype(dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the materialised tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    @property
    def key(self) -> str:
        """Source and log in one line: equal keys mean equal tensors."""
        return "|".join((self.source.key, *map(str, self.transforms)))

    @property
    def log(self) -> tuple[str, ...]:
        """Everything that was done to the tensor, in order, a line each: multiplied, permuted, rotated, rounded."""
        source = self.source
        rounded = (*source.rounding.weight.log, source.text) if isinstance(source, RoundedSource) else ()
        return (*self.history, *rounded, *map(log_text, self.transforms))

    @property
    def is_bound(self) -> bool:
        """Whether there are bytes behind it."""
        source = self.source
        return source.rounding.weight.is_bound if isinstance(source, RoundedSource) else not isinstance(source, UnboundSource)

    def then(self, transform: Transform) -> Constant:
        """This constant with one more transform at the end of its log."""
        return replace(self, transforms=(*self.transforms, transform))

    def materialize(self) -> Tensor:
        """Load the source and apply the log; the caller owns the result and nothing is kept here."""
        tensor = self.source.load()
        for transform in self.transforms:
            tensor = transform.apply(tensor)
        return tensor


def log_text(transform: Transform) -> str:
    """The entry as people read it: without the addresses by which keys tell tensors apart, so equal in another process."""
    return _ADDRESS.sub(r"\1", str(transform))


_ADDRESS = re.compile(r"(memory:\w+\[[\d, ]*\]):[0-9a-f]+:\([\d, ]*\)")


def tensor_constant(tensor: Tensor) -> Constant:
    """A constant around a tensor in memory."""
    return Constant(TensorSource(tensor))


def rounded_constants(weight: Constant, form: QuantFormat, name: str, method: str = "nearest") -> dict[str, Constant]:
    """The parts (`QuantFormat.parts`) of a weight rounded to `form` by one of `LAZY_METHODS`: when asked for, once for all."""
    rounding = Rounding(weight, form, name, method)
    return {part: Constant(RoundedSource(rounding, part), format=form) for part in form.parts}


def uncast(constant: Constant) -> Constant:
    """The constant without the casts at the end of its log: the most precise values there are."""
    transforms = constant.transforms
    while transforms and isinstance(transforms[-1], Cast):
        transforms = transforms[:-1]
    return replace(constant, transforms=transforms)


def widened(constant: Constant) -> Constant:
    """The constant in float64: its source is widened before anything else, and no transform rounds to a narrower dtype again."""
    if not constant.source.dtype.is_floating_point:
        return uncast(constant).then(Cast(torch.float64))
    kept = (transform for transform in constant.transforms if not isinstance(transform, Cast))
    return replace(constant, transforms=(Cast(torch.float64), *kept))
