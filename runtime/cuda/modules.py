"""The cubins of an artifact as functions on the device: each loaded once, before anything is captured."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.errors import EngineError
from qcompile.ir.lowered import BUCKETS, Kernel, Launch, Step
from qcompile.runtime.cuda.driver import SHARED_BYTES_OPT_IN, Driver


class Modules:
    """Functions by kernel and launch, out of binaries that the artifact's loader has let through."""

    def __init__(self, driver: Driver, kernels: Mapping[str, Kernel], binaries: Mapping[str, bytes]) -> None:
        """`kernels` by kernel name, `binaries` by the name that `Launch.binary` gives."""
        self._driver = driver
        self._kernels = kernels
        self._binaries = binaries
        self._modules: dict[str, int] = {}
        self._functions: dict[tuple[str, str, int], int] = {}

    def kernel(self, step: Step, count: int) -> Kernel | None:
        """The kernel of a step for that many rows, or None where the step is to run as its reference.

        Raises:
            EngineError: for a kernel that the artifact does not have.
        """
        name = step.kernels.get("") or next((kernel for bucket, kernel in step.kernels.items() if _holds(bucket, count)), None)
        if name is None:
            return None
        if name not in self._kernels:
            place = step.node or step.operator
            raise EngineError(f"step {place}: expected a kernel of the artifact, got {name!r}; compile the model again")
        return self._kernels[name]

    def function(self, kernel: Kernel, launch: Launch) -> int:
        """The function behind a launch; its module is loaded on first use.

        Raises:
            EngineError: for a binary that is not there, or more shared memory or warps than the device has.
        """
        symbol = launch.symbol or launch.function
        about = f"kernel {kernel.name} ({symbol})"
        limit = self._driver.attribute(SHARED_BYTES_OPT_IN)
        if launch.shared_bytes > limit:
            raise EngineError(
                f"{about}: expected at most {limit} bytes of shared memory, got {launch.shared_bytes}; "
                f"compile for this device's architecture, {self._driver.architecture}"
            )
        if launch.binary not in self._modules:
            if launch.binary not in self._binaries:
                raise EngineError(
                    f"{about}: expected the binary {launch.binary!r} among those the loader let through, got none; "
                    "load with allow_native=True if you trust the artifact"
                )
            self._modules[launch.binary] = self._driver.load_module(self._binaries[launch.binary], about)
        key = (launch.binary, symbol, launch.shared_bytes)
        if key not in self._functions:
            self._functions[key] = self._driver.function(self._modules[launch.binary], symbol, launch.shared_bytes, about)
        return self._functions[key]

    def close(self) -> None:
        """Unload everything."""
        for module in self._modules.values():
            self._driver.unload_module(module)
        self._modules.clear()
        self._functions.clear()


def _holds(bucket: str, count: int) -> bool:
    least, most = BUCKETS[bucket]
    return least <= count <= most
