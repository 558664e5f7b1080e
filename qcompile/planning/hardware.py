"""What devices can do at most: bytes a second from memory, and operations a second by the type that is multiplied.

From the makers' data sheets, dense (without sparsity), at boost clock:

- A100 80 GB SXM: NVIDIA A100 Tensor Core GPU data sheet (2021): 2,039 GB/s, 312 TFLOP/s bf16, 624 TOPS int8.
- L40S: NVIDIA L40S data sheet (2023): 864 GB/s, 362 TFLOP/s bf16, 733 TFLOP/s fp8, 733 TOPS int8.
- RTX 4090: NVIDIA Ada GPU architecture white paper (2022), table 2: 1,008 GB/s, 165.2 TFLOP/s bf16 and 330.3 TFLOP/s fp8 with float32
  sums, 660.6 TOPS int8.
- H100 SXM: NVIDIA H100 data sheet (2023): 3,350 GB/s, 989 TFLOP/s bf16, 1,979 TFLOP/s fp8, 1,979 TOPS int8.
- H200 SXM: NVIDIA H200 data sheet (2024): 4,800 GB/s, else as the H100.
- B200: NVIDIA DGX B200 data sheet (2024), an eighth of its 64 TB/s and 72 PFLOP/s of sparse fp8: 8,000 GB/s, 2,250 TFLOP/s bf16,
  4,500 TFLOP/s fp8, 4,500 TOPS int8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qcompile.errors import OptionError
from qcompile.target import Target

_READ_BYTES = 128 << 20
_SIZE = 1024
_TRIES = 3


@dataclass(frozen=True)
class Device:
    """A device's limits.

    Attributes:
        name: as people call it.
        bandwidth: bytes a second that it reads from its memory.
        compute: operations a second (a multiplication and an addition are two), for operands of 16 bits, or of 32 on CPUs.
        low_bit: the same by the kind of quantized operands, `int8` and `fp8`; a kind that is missing is multiplied as `compute`.
        source: where the numbers come from.
    """

    name: str
    bandwidth: float
    compute: float
    low_bit: tuple[tuple[str, float], ...] = ()
    source: str = "data sheet"

    def rate(self, kind: str) -> float:
        """Operations a second for operands of a kind."""
        return dict(self.low_bit).get(kind, self.compute)


def _gpu(name: str, gigabytes: float, half: float, **low_bit: float) -> Device:
    return Device(name, gigabytes * 1e9, half * 1e12, tuple((kind, rate * 1e12) for kind, rate in low_bit.items()))


DEVICES: dict[str, tuple[Device, ...]] = {
    "sm80": (_gpu("A100", 2039, 312, int8=624),),
    "sm89": (_gpu("L40S", 864, 362, int8=733, fp8=733), _gpu("RTX4090", 1008, 165.2, int8=660.6, fp8=330.3)),
    "sm90": (_gpu("H100", 3350, 989, int8=1979, fp8=1979), _gpu("H200", 4800, 989, int8=1979, fp8=1979)),
    "sm100": (_gpu("B200", 8000, 2250, int8=4500, fp8=4500),),
}
"""Architecture -> its devices; the first is what a plan assumes."""


def device_for(target: Target, name: str | None = None, bandwidth: float | None = None, compute: float | None = None) -> Device:
    """The device that a target is planned for: a data sheet's, or this machine where the target runs on a CPU.

    Args:
        target: what to compile for.
        name: of a device of its architecture.
        bandwidth: bytes a second, in place of the device's.
        compute: operations a second of every kind, in place of the device's.

    Raises:
        OptionError: for a device that the architecture does not have, or numbers that are not above 0.
    """
    for option, value in (("device_bandwidth", bandwidth), ("device_compute", compute)):
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"{option}={value:g}: expected a number above 0, in bytes or operations a second; leave it out")
    device = _usual(target, bandwidth, compute) if name is None else _named(target, name)
    if bandwidth is not None or compute is not None:
        device = replace(device, source=f"{device.source}, as given")
    if compute is not None:
        device = replace(device, compute=compute, low_bit=())
    return device if bandwidth is None else replace(device, bandwidth=bandwidth)


def _usual(target: Target, bandwidth: float | None, compute: float | None) -> Device:
    known = DEVICES.get(target.arch, ())
    return known[0] if known else _this_machine(bandwidth, compute)


def _named(target: Target, name: str) -> Device:
    known = DEVICES.get(target.arch, ())
    found = next((device for device in known if device.name.lower() == name.lower().replace(" ", "")), None)
    if found is None:
        names = ", ".join(device.name for device in known) or "none: it is measured on this machine"
        raise OptionError(f"device {name!r}: expected one of {target.arch} ({names}); or pass device_bandwidth and device_compute")
    return found


def _this_machine(bandwidth: float | None, compute: float | None) -> Device:
    """Measured in tens of milliseconds, what is not given."""
    numbers = torch.get_num_threads()
    name = f"this CPU, {numbers} thread{'s' if numbers > 1 else ''}"
    return Device(name, bandwidth or _read_bandwidth(), compute or _multiply_rate(), source="measured on this machine")


def _read_bandwidth() -> float:
    """Of a sum over more than caches hold."""
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / _least_seconds(data.sum)


def _multiply_rate() -> float:
    """Of a product of float32 matrices."""
    left, right = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    return 2 * _SIZE**3 / _least_seconds(lambda: left @ right)


def _least_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)
