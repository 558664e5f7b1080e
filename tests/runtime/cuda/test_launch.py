"""Frozen launches: the packed bytes, the numbers a toy kernel computes from them, and every refused assumption."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.lowered import Launch, Parameter
from qcompile.ir.size import Size
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.launch import FrozenLaunch, parameter_offsets, stride_axes
from qcompile.runtime.cuda.operands import Operand, is_dense
from tests.runtime.cuda.stubbed import Stub


def pointer(name: str, dtype: str = "fp32", divisible_by: int = 16) -> Parameter:
    return Parameter(name, "pointer", name, dtype, divisible_by)


def integer(name: str, value: Size, divisible_by: int = 1) -> Parameter:
    return Parameter(name, "i32", value, "i32", divisible_by)


ADD = Launch(
    "add_f32",
    (("ceildiv", "rows", 4), 2, 1),
    (pointer("x"), pointer("y"), pointer("out"), integer("n", "rows")),
    num_warps=2,
    shared_bytes=1024,
)


def frozen(driver: Driver, launch: Launch, tensors: dict[str, Tensor], **sizes: int) -> FrozenLaunch:
    function = driver.function(driver.load_module(b"TOYCUBIN"), launch.function, launch.shared_bytes)
    operands = {name: Operand.of(tensor) for name, tensor in tensors.items()}
    return FrozenLaunch(driver, function, "toy", launch, operands, sizes, driver.create_stream())


def vectors(count: int = 8) -> dict[str, Tensor]:
    return {"x": torch.arange(count, dtype=torch.float32), "y": torch.full((count,), 10.0), "out": torch.zeros(count)}


def test_offsets_follow_natural_alignment_and_end_in_two_hidden_pointers() -> None:
    offsets, size = parameter_offsets((pointer("a"), integer("b", 1), pointer("c"), integer("d", 1), integer("e", 1), integer("f", 1)))
    assert offsets == (0, 8, 16, 24, 28, 32)
    assert size == 40 + 16
    assert parameter_offsets(()) == ((), 16)


def test_a_kernel_finds_its_arguments(stub: Stub, driver: Driver) -> None:
    tensors = vectors()
    launch = frozen(driver, ADD, tensors, rows=8)
    launch()
    assert torch.equal(tensors["out"], torch.arange(8) + 10.0)
    call = stub.calls("cuLaunchKernel")[0]
    assert (list(call.grid), list(call.block), call.shared) == ([2, 2, 1], [64, 1, 1], 1024)
    addresses = [tensors[name].data_ptr() for name in ("x", "y", "out")]
    assert call.packed == struct.pack("<QQQi4xQQ", *addresses, 8, 0, 0)
    assert call.packed == launch.packed


def test_a_second_launch_is_one_call(stub: Stub, driver: Driver) -> None:
    launch = frozen(driver, ADD, vectors(), rows=8)
    before = len(stub.calls())
    launch()
    launch()
    assert [call.name for call in stub.calls()[before:]] == [b"cuLaunchKernel"] * 2


def test_patching_changes_grid_and_arguments(stub: Stub, driver: Driver) -> None:
    tensors = vectors()
    launch = frozen(driver, ADD, tensors, rows=8)
    other = torch.zeros(8)
    launch.patch({name: Operand.of(tensor) for name, tensor in {**tensors, "out": other}.items()}, {"rows": 3})
    launch()
    assert other.tolist() == [10.0, 11.0, 12.0, 0, 0, 0, 0, 0]
    assert list(stub.calls("cuLaunchKernel")[0].grid) == [1, 2, 1]


def test_a_refused_patch_changes_nothing(driver: Driver) -> None:
    tensors = vectors()
    launch = frozen(driver, ADD, tensors, rows=8)
    packed = launch.packed
    with pytest.raises(EngineError, match="grid axis x"):
        launch.patch({name: Operand.of(tensor) for name, tensor in {**tensors, "out": torch.zeros(8)}.items()}, {"rows": 0})
    assert launch.packed == packed


def test_operands_live_as_long_as_the_launch(driver: Driver) -> None:
    launch = frozen(driver, ADD, vectors(1 << 16), rows=1 << 16)
    addresses = struct.unpack_from("<QQQ", launch.packed)
    others = [torch.zeros(1 << 16) for _ in range(8)]
    assert not set(addresses) & {tensor.data_ptr() for tensor in others}
    launch()


def test_strides_come_from_the_operand(driver: Driver) -> None:
    parameters = (
        pointer("x", divisible_by=4),
        pointer("out"),
        integer("stride", "stride:x:-1"),
        integer("n", "rows"),
        integer("factor", 3),
    )
    launch = Launch("scale_f32", (1, 1, 1), parameters)
    x, out = torch.arange(8, dtype=torch.float32)[::2], torch.zeros(4)
    frozen(driver, launch, {"x": x, "out": out}, rows=4)()
    assert out.tolist() == [0.0, 6.0, 12.0, 18.0]


@pytest.mark.parametrize(("shape", "expected"), [((1, 6), 0), ((2, 6), 6)])
def test_a_broadcast_axis_has_stride_0_where_it_has_one_element(driver: Driver, shape: tuple[int, ...], expected: int) -> None:
    launch = Launch("other", (1, 1, 1), (pointer("x"), integer("stride", "broadcast:x:0")))
    packed = frozen(driver, launch, {"x": torch.zeros(shape)}).packed
    assert struct.unpack_from("<i", packed, 8) == (expected,)


def test_dense_means_what_a_kernel_without_strides_assumes() -> None:
    x = torch.zeros(4, 6, 8)
    assert is_dense(x.shape, x.stride(), frozenset())
    assert not is_dense(x[:, :, ::2].shape, x[:, :, ::2].stride(), frozenset())
    last = x[:, -1:, :]
    assert not is_dense(last.shape, last.stride(), frozenset()), "rows lie six apart"
    assert not is_dense(last.shape, last.stride(), frozenset({1})), "the stride of an axis with one element says nothing of the rows"
    half = x[:, :, :4]
    assert is_dense(half.shape, half.stride(), frozenset({1})), "a row stride walks all rows"
    turned = x.transpose(0, 1)
    assert is_dense(turned.shape, turned.stride(), frozenset({0, 1}))
    assert is_dense((1, 5), (77, 1), frozenset()), "an axis of one element lies anywhere"


def test_stride_axes_count_from_either_end() -> None:
    launch = Launch(
        "f", (1, 1, 1), (pointer("x"), integer("a", "stride:x:-2"), integer("b", ("mul", "stride:x:0", 2)), integer("c", "broadcast:x:2"))
    )
    assert stride_axes(launch, "x", 3) == {0, 1}
    assert stride_axes(launch, "y", 3) == frozenset()


def refused(driver: Driver, launch: Launch, tensors: dict[str, Tensor], match: str, **sizes: int) -> None:
    with pytest.raises(EngineError, match=match):
        frozen(driver, launch, tensors, **sizes)


def one(parameter: Parameter, *more: Parameter) -> Launch:
    return Launch("f", (1, 1, 1), (parameter, *more))


def test_refused_pointers(driver: Driver) -> None:
    x = torch.zeros(64)
    refused(
        driver,
        one(pointer("x")),
        {"x": x[1:]},
        r"^kernel toy: parameter x: expected an address that is a multiple of 16 bytes, got 0x[0-9a-f]+; it was compiled for that",
    )
    refused(driver, one(pointer("x", "bf16")), {"x": x}, r"parameter x: expected elements of bf16, got float32")
    refused(driver, one(pointer("x", "f4")), {"x": x}, r"parameter x: expected elements of f4, got float32")
    refused(driver, one(pointer("bias")), {"x": x}, r"parameter bias: expected one of the operands x, got 'bias'")
    refused(driver, one(pointer("x")), {"x": torch.zeros(0)}, r"parameter x: expected memory, got a null pointer")
    turned = r"parameter x: expected contiguous memory where no stride is passed, got shape \(8, 4\) with strides \(1, 8\)"
    refused(driver, one(pointer("x")), {"x": torch.zeros(4, 8).t()}, turned)


def test_a_workspace_has_no_dtype(driver: Driver) -> None:
    launch = one(pointer("partial"))
    memory = torch.zeros(64, dtype=torch.uint8)
    function = driver.function(driver.load_module(b"TOYCUBIN"), "f")
    packed = FrozenLaunch(driver, function, "toy", launch, {"partial": Operand.workspace(memory)}, {}, driver.create_stream()).packed
    assert struct.unpack_from("<Q", packed) == (memory.data_ptr(),)


def test_refused_integers(driver: Driver) -> None:
    x = torch.zeros(4, 24)
    refused(driver, one(integer("n", "rows", 16)), {}, r"parameter n: expected a multiple of 16, got 24", rows=24)
    refused(driver, one(integer("n", ("mul", "rows", 2))), {}, r"parameter n: expected a 32-bit integer, got 4294967296", rows=1 << 31)
    refused(
        driver,
        one(integer("n", "columns")),
        {},
        r"kernel toy: parameter n: size expression: unknown name 'columns'; expected one of rows",
        rows=1,
    )
    refused(driver, one(integer("s", "stride:y:0")), {"x": x}, r"parameter s: expected a stride of one of x, got 'stride:y:0'")
    refused(driver, one(integer("s", "stride:x:2")), {"x": x}, r"parameter s: expected an axis of x, which has 2, got 2")
    refused(driver, one(integer("s", "stride:x:0", 16)), {"x": x}, r"parameter s: expected a multiple of 16, got 24")
    refused(driver, one(Parameter("f", "f32", 1, "fp32")), {}, r"parameter f: expected a pointer or an i32, got f32")


def test_refused_grids(driver: Driver) -> None:
    refused(driver, Launch("f", ("rows", 1, 1), ()), {}, r"kernel toy: grid axis x: expected 1 to 2147483647 programs, got 0", rows=0)
    refused(driver, Launch("f", (1, "rows", 1), ()), {}, r"grid axis y: expected 1 to 65535 programs, got 65536", rows=65536)


def test_a_failed_launch_names_the_kernel(stub: Stub, driver: Driver) -> None:
    launch = frozen(driver, ADD, vectors(), rows=8)
    stub.fail("cuLaunchKernel", 700, nth=2)
    launch()
    with pytest.raises(EngineError, match=r"kernel toy: cuLaunchKernel: .*CUDA_ERROR_ILLEGAL_ADDRESS \(700\): an illegal memory access"):
        launch()


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "i8"), (torch.float8_e4m3fn, "fp8e4nv")])
def test_codes_of_activations_are_operands(stub: Stub, driver: Driver, dtype: torch.dtype, kind: str) -> None:
    codes = torch.zeros(64, dtype=dtype)
    toy = Launch("toy", (1, 1, 1), (pointer("codes", kind),))
    frozen(driver, toy, {"codes": codes})()
    assert struct.unpack_from("<Q", stub.calls("cuLaunchKernel")[0].packed)[0] == codes.data_ptr()
    with pytest.raises(EngineError, match=f"parameter codes: expected elements of {kind}, got uint8"):
        frozen(driver, toy, {"codes": torch.zeros(64, dtype=torch.uint8)})
