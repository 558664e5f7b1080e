"""The binding: which entry points are called with what, and what a failure says."""

from __future__ import annotations

import pytest

from qcompile.errors import EngineError
from qcompile.runtime.cuda.driver import Driver
from tests.runtime.cuda.stubbed import Stub


def test_a_missing_library_says_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"/nowhere/libcuda.so: expected the CUDA driver's library, got .*; install an NVIDIA driver"):
        Driver("/nowhere/libcuda.so")


def test_the_primary_context_is_retained_and_made_current(stub: Stub, driver: Driver) -> None:
    names = [call.name.decode() for call in stub.calls()]
    assert names == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    driver.release()
    assert stub.calls()[-1].name == b"cuDevicePrimaryCtxRelease_v2"


def test_architecture_is_named_as_targets_are(driver: Driver) -> None:
    assert driver.architecture == "sm90"


def test_a_device_that_is_not_there_is_an_error(stub: Stub) -> None:
    with pytest.raises(
        EngineError, match=r"cuDeviceGet: expected CUDA_SUCCESS, got CUDA_ERROR_INVALID_DEVICE \(101\): invalid device ordinal"
    ):
        Driver(stub.path, device=3)


def test_failures_name_kernel_call_and_code(driver: Driver) -> None:
    with pytest.raises(
        EngineError, match=r"kernel gemm: cuModuleLoadData: expected CUDA_SUCCESS, got CUDA_ERROR_INVALID_IMAGE \(200\): device"
    ):
        driver.load_module(b"not a cubin", about="kernel gemm")
    module = driver.load_module(b"TOYCUBIN")
    with pytest.raises(EngineError, match=r"kernel gemm: cuModuleGetFunction: .*CUDA_ERROR_NOT_FOUND \(500\)"):
        driver.function(module, "missing", about="kernel gemm")


def test_a_code_without_a_name_is_still_reported(stub: Stub, driver: Driver) -> None:
    stub.fail("cuModuleLoadData", 12345)
    with pytest.raises(EngineError, match=r"got unknown error \(12345\)"):
        driver.load_module(b"TOYCUBIN")


@pytest.mark.parametrize(("size", "asked"), [(0, False), (48 * 1024, False), (48 * 1024 + 1, True), (200_000, True)])
def test_shared_memory_above_48_kib_is_asked_for(stub: Stub, driver: Driver, size: int, asked: bool) -> None:
    driver.function(driver.load_module(b"TOYCUBIN"), "add_f32", shared_bytes=size)
    details = [call.detail.decode() for call in stub.calls("cuFuncSetAttribute")]
    assert details == ([f"add_f32 8 {size}"] if asked else [])


def test_memory_goes_there_and_back(driver: Driver) -> None:
    address = driver.allocate(8)
    driver.upload(address, b"12345678")
    stream = driver.create_stream()
    driver.clear(address, 4, stream)
    driver.synchronize(stream)
    assert driver.download(address, 8) == bytes(4) + b"5678"
    driver.destroy_stream(stream)
    driver.free(address)


def test_out_of_memory_is_reported(stub: Stub, driver: Driver) -> None:
    stub.fail("cuMemAlloc_v2", 2)
    with pytest.raises(EngineError, match=r"cuMemAlloc_v2: expected CUDA_SUCCESS, got CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory"):
        driver.allocate(8)


def test_synchronising_a_captured_stream_fails_and_abandoning_ends_it(stub: Stub, driver: Driver) -> None:
    stream = driver.create_stream()
    driver.begin_capture(stream)
    with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        driver.synchronize(stream)
    driver.abandon_capture(stream)
    driver.synchronize(stream)
    assert [call.detail.decode() for call in stub.calls("cuStreamBeginCapture_v2")] == ["2"], (
        "relaxed: torch's allocator may work during capture"
    )
    assert len(stub.calls("cuGraphDestroy")) == 1
