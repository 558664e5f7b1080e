"""What lies beside the codes of a vector: float16 numbers, and outliers kept aside with their places."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import FormatError

OUTLIER_BYTES = 3
"""An outlier's float16 and the byte of its channel."""
_CHANNELS = 256
"""As many as a byte tells apart."""


def half_bytes(x: Tensor) -> Tensor:
    """X [..., K] rounded to float16, as uint8 [..., 2·K]."""
    return x.to(torch.float16).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def halves(packed: Tensor) -> Tensor:
    """Invert `half_bytes`: uint8 [..., 2·K] to float32 [..., K]."""
    if not packed.shape[-1]:
        return packed.to(torch.float32)
    # A copy: float16 must lie at even addresses.
    return packed.clone(memory_format=torch.contiguous_format).view(torch.float16).to(torch.float32)


def require_channels(size: int, form: str) -> None:
    """Refuse vectors whose channels a byte cannot number.

    Raises:
        FormatError: for a head size above 256.
    """
    if size > _CHANNELS:
        raise FormatError(
            f"cache format {form}: expected a head size of at most {_CHANNELS}, as a channel's place is stored in a byte, got {size}; "
            "choose a format that stores no places, such as 'int4 g64 asym'"
        )


def require_outliers(count: int, size: int, form: str) -> None:
    """Refuse vectors that are all outliers, or whose channels a byte cannot number.

    Raises:
        FormatError: for a head size of not more than `count`, or above 256 where there are outliers.
    """
    if count:
        require_channels(size, form)
    if count >= size:
        raise FormatError(f"cache format {form}: expected fewer outliers than the head size {size}, got s{count}; choose fewer")


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """The channels int64 [..., count] of the largest of `magnitudes` [..., D]; of equal ones the first."""
    return magnitudes.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def pack_outliers(x: Tensor, channels: Tensor) -> Tensor:
    """The numbers of x [..., D] at `channels` [..., s]: float16 after float16, then channel after channel, as uint8 [..., 3·s]."""
    return torch.cat((half_bytes(x.gather(-1, channels)), channels.to(torch.uint8)), dim=-1)


def put_back(x: Tensor, packed: Tensor) -> Tensor:
    """X [..., D] with the outliers of `pack_outliers`, uint8 [..., 3·s], at their places."""
    count = packed.shape[-1] // OUTLIER_BYTES
    return x.scatter(-1, packed[..., 2 * count :].long(), halves(packed[..., : 2 * count]).to(x.dtype))
