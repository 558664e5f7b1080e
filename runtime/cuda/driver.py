"""A thin binding of libcuda, the CUDA driver (https://docs.nvidia.com/cuda/cuda-driver-api): every return code is checked.

The library's path can be injected, so that tests run against a stub with the same entry points.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from qcompile.errors import EngineError

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemcpyHtoD_v2": (c_ulonglong, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_ulonglong, c_size_t),
    "cuMemsetD8Async": (c_ulonglong, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
"""Entry point -> argument types; each returns a `CUresult`. The suffixes are those of the current ABI."""

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Values of `CUdevice_attribute`."""
SHARED_BYTES_OPT_IN = 97
"""`CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`."""
MAX_DYNAMIC_SHARED_BYTES = 8
"""`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`."""
STATIC_SHARED_BYTES = 48 * 1024
"""Shared memory that a function may have without asking."""
NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: does not wait for the legacy default stream, which cannot be captured."""
CAPTURE_RELAXED = 2
"""`CU_STREAM_CAPTURE_MODE_RELAXED`: an allocator may still ask the driver for memory while a stream is captured."""


class Driver:
    """libcuda with the primary context of one device (the context torch uses) made current."""

    def __init__(self, path: str | None = None, device: int = 0) -> None:
        """Load the library at `path` (the system's `libcuda.so.1` if None) and retain the context of GPU number `device`.

        Raises:
            EngineError: if the library or the device is not there.
        """
        try:
            self.library = ctypes.CDLL(path or "libcuda.so.1")
        except OSError as error:
            place = path or "libcuda.so.1"
            raise EngineError(
                f"{place}: expected the CUDA driver's library, got {error}; install an NVIDIA driver or use another engine"
            ) from error
        for name, types in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, c_int
        self.call("cuInit", 0)
        self.device = self._int("cuDeviceGet", device)
        self.context = self._pointer("cuDevicePrimaryCtxRetain", self.device)
        self.call("cuCtxSetCurrent", self.context)

    def call(self, name: str, *args: Any, about: str = "") -> None:
        """Call one entry point.

        Raises:
            EngineError: naming `about` (a kernel), the call, and the error's code and text, unless it succeeds.
        """
        code = getattr(self.library, name)(*args)
        if code:
            raise self.failure(name, code, about)

    def failure(self, name: str, code: int, about: str = "") -> EngineError:
        """The error that says that the call `name` returned `code`."""
        texts = []
        for describe in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            known = getattr(self.library, describe)(code, ctypes.byref(text)) == 0 and text.value is not None
            texts.append(text.value.decode() if known and text.value else "unknown error")
        place = f"{about}: " if about else ""
        return EngineError(f"{place}{name}: expected CUDA_SUCCESS, got {texts[0]} ({code}): {texts[1]}")

    def _int(self, name: str, *args: Any) -> int:
        result = c_int()
        self.call(name, ctypes.byref(result), *args)
        return result.value

    def _pointer(self, name: str, *args: Any, about: str = "") -> int:
        result = c_void_p()
        self.call(name, ctypes.byref(result), *args, about=about)
        return result.value or 0

    def make_current(self) -> None:
        """Make the context current in the calling thread; each thread that launches has to do so once."""
        self.call("cuCtxSetCurrent", self.context)

    def release(self) -> None:
        """Give the context back; nothing may be called afterwards."""
        self.call("cuDevicePrimaryCtxRelease_v2", self.device)

    def attribute(self, number: int) -> int:
        """A `CUdevice_attribute` of the device."""
        return self._int("cuDeviceGetAttribute", number, self.device)

    @property
    def architecture(self) -> str:
        """The device's architecture as targets name it: `sm90`."""
        return f"sm{self.attribute(CAPABILITY_MAJOR)}{self.attribute(CAPABILITY_MINOR)}"

    def load_module(self, cubin: bytes, about: str = "") -> int:
        """Load a cubin and return the module's handle."""
        return self._pointer("cuModuleLoadData", cubin, about=about)

    def function(self, module: int, symbol: str, shared_bytes: int = 0, about: str = "") -> int:
        """The handle of the function called `symbol`, allowed `shared_bytes` of dynamic shared memory."""
        handle = self._pointer("cuModuleGetFunction", module, symbol.encode(), about=about)
        if shared_bytes > STATIC_SHARED_BYTES:
            self.call("cuFuncSetAttribute", handle, MAX_DYNAMIC_SHARED_BYTES, shared_bytes, about=about)
        return handle

    def unload_module(self, module: int) -> None:
        """Unload a module; its functions may not be launched afterwards."""
        self.call("cuModuleUnload", module)

    def create_stream(self) -> int:
        """A new stream that does not wait for the default one."""
        return self._pointer("cuStreamCreate", NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back once its work is done."""
        self.call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for everything on the stream."""
        self.call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """Record what is put on the stream from now on instead of running it."""
        self.call("cuStreamBeginCapture_v2", stream, CAPTURE_RELAXED)

    def end_capture(self, stream: int) -> int:
        """Stop recording and return the graph."""
        graph = c_void_p()
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        return graph.value or 0

    def abandon_capture(self, stream: int) -> None:
        """Stop a recording that went wrong; the driver's complaint about it is what the caller already knows."""
        graph = c_void_p()
        self.library.cuStreamEndCapture(stream, ctypes.byref(graph))
        if graph.value:
            self.call("cuGraphDestroy", graph.value)

    def instantiate(self, graph: int) -> int:
        """An executable from a graph, which is given back."""
        executable = self._pointer("cuGraphInstantiateWithFlags", graph, 0)
        self.call("cuGraphDestroy", graph)
        return executable

    def launch_graph(self, executable: int, stream: int) -> None:
        """Put an executable graph on the stream."""
        self.call("cuGraphLaunch", executable, stream)

    def destroy_graph(self, executable: int) -> None:
        """Give an executable graph back."""
        self.call("cuGraphExecDestroy", executable)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the device."""
        address = c_ulonglong()
        self.call("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", address)

    def upload(self, address: int, data: bytes) -> None:
        """Copy bytes to the device and wait."""
        self.call("cuMemcpyHtoD_v2", address, data, len(data))

    def download(self, address: int, size: int) -> bytes:
        """Copy `size` bytes from the device and wait."""
        result = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", result, address, size)
        return result.raw

    def clear(self, address: int, size: int, stream: int, about: str = "") -> None:
        """Put the zeroing of `size` bytes on the stream."""
        self.call("cuMemsetD8Async", address, 0, size, stream, about=about)

    def launch(self, arguments: Sequence[Any], about: str) -> None:
        """Launch with prepared arguments of `cuLaunchKernel`."""
        code = self.library.cuLaunchKernel(*arguments)
        if code:
            raise self.failure("cuLaunchKernel", code, about)
