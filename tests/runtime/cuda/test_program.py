"""Entries bound to sizes: memory, kernels per bucket, copies, workspaces, layouts, references."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch

from qcompile.errors import ArtifactError, EngineError
from qcompile.ir.layouts import split_half
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.graph import CapturedProgram
from qcompile.runtime.cuda.program import Program
from tests.runtime.cuda.plans import ADD, CLONE, buffer, context, entry, integer, kernel, launch, pointer, step
from tests.runtime.cuda.stubbed import Stub

SIZES = {"batch": 2, "sequence": 1}
KERNELS = {"add": ADD, "clone": CLONE}
ADD_STEP = step("aten.add.Tensor", "x", "y", out="sum", kernels={"": "add"})
XY = [buffer("x", "input"), buffer("y", "constant", (2, 1, 4))]
Y = torch.arange(8, dtype=torch.float32).view(2, 1, 4)


def test_kernels_compute_over_planned_memory(driver: Driver) -> None:
    made, _ = context(driver, KERNELS, {"y": Y})
    plan = entry(
        [*XY, buffer("sum", "intermediate"), buffer("z", "output")],
        [ADD_STEP, step("aten.clone.default", "sum", out="z", kernels={"": "clone"})],
        ("z",),
    )
    program = Program(made, plan, SIZES, {})
    for _ in range(2):
        program.inputs["x"].fill_(5.0)
        program.run()
        assert torch.equal(program.outputs[0], Y + 5.0)
    assert program.obstacles == []


def test_a_zeroed_workspace_is_cleared_before_every_run(stub: Stub, driver: Driver) -> None:
    made, _ = context(driver, KERNELS)
    plan = entry([buffer("x", "input"), buffer("z", "output")], [step("aten.clone.default", "x", out="z", kernels={"": "clone"})], ("z",))
    program = Program(made, plan, SIZES, {})
    before = len(stub.calls())
    program.run()
    program.run()
    assert [call.name.decode() for call in stub.calls()[before:]] == ["cuMemsetD8Async", "cuLaunchKernel", "cuLaunchKernel"] * 2


@pytest.mark.parametrize(
    ("batch", "sequence", "expected"), [(1, 1, "one"), (2, 1, "few"), (1, 63, "few"), (1, 64, "many"), (8, 64, "many")]
)
def test_kernels_are_chosen_by_rows_when_bound(stub: Stub, driver: Driver, batch: int, sequence: int, expected: str) -> None:
    kernels = {
        name: kernel(name, "linear", launch(name, pointer("x"), pointer("weight"), pointer("out"))) for name in ("one", "few", "many")
    }
    chosen = step("aten.linear.default", "x", "w", out="z", kernels={"m1": "one", "m2-63": "few", "m64": "many"})
    made, _ = context(driver, kernels, {"w": torch.zeros(4, 4)})
    program = Program(
        made,
        entry([buffer("x", "input"), buffer("w", "constant", (4, 4)), buffer("z", "output")], [chosen], ("z",)),
        {"batch": batch, "sequence": sequence},
        {},
    )
    program.run()
    assert stub.launched() == [expected]


def test_rows_are_those_of_the_operand_not_of_the_entry(stub: Stub, driver: Driver) -> None:
    """The head of a prefill sees one row per sequence: the entry's batch times sequence would read past it."""
    kernels = {
        name: kernel(name, "linear", launch(name, pointer("x"), pointer("weight"), pointer("out"), integer("rows", "rows")))
        for name in ("one", "many")
    }
    plan = entry(
        [
            buffer("x", "input"),
            buffer("p", "input", ("batch", "sequence"), "int64"),
            buffer("w", "constant", (4, 4)),
            buffer("last", "intermediate", ("batch", 1, 4)),
            buffer("z", "output", ("batch", 1, 4)),
        ],
        [
            step("qcompile.gather_last.default", "x", "p", out="last"),
            step("aten.linear.default", "last", "w", out="z", kernels={"m1": "one", "m64": "many"}),
        ],
        ("z",),
    )
    made, _ = context(driver, kernels, {"w": torch.zeros(4, 4)})
    Program(made, plan, {"batch": 1, "sequence": 64}, {}).run()
    assert stub.launched() == ["one"]
    assert struct.unpack_from("<i", stub.calls("cuLaunchKernel")[0].packed, 24) == (1,)


def test_attention_over_the_cache_is_chosen_by_tokens_per_sequence(stub: Stub, driver: Driver) -> None:
    pointers = [pointer("q"), pointer("keys"), pointer("page_table", "i32"), pointer("positions", "i64"), pointer("out")]
    numbers = [
        integer("pages", "pages"),
        integer("page_tokens", "page_tokens"),
        integer("sequence", "sequence"),
        *(integer(f"s{axis}", f"stride:out:{axis}") for axis in range(3)),
    ]
    kernels = {
        name: kernel(name, "cache_attend", launch(name, *pointers, *numbers, grid=(1, "batch", 1))) for name in ("flash_decode", "chunked")
    }
    plan = entry(
        [
            buffer("q", "input", ("batch", 3, "sequence", 4)),
            buffer("t", "input", ("batch", "pages_per_sequence"), "int32"),
            buffer("p", "input", ("batch", "sequence"), "int64"),
            buffer("keys_0", "state", ("pages", 1, "page_tokens", 4)),
            buffer("values_0", "state", ("pages", 1, "page_tokens", 4)),
            buffer("z", "output", ("batch", 3, "sequence", 4), order=(0, 2, 1, 3)),
        ],
        [
            step(
                "qcompile.cache_attend.default",
                "q",
                "keys_0",
                "values_0",
                "t",
                "p",
                1.0,
                0,
                0.0,
                None,
                out="z",
                kernels={"m1": "flash_decode", "m2-63": "chunked"},
            )
        ],
        ("z",),
    )
    states = {name: torch.zeros(5, 1, 16, 4) for name in ("keys_0", "values_0")}
    made, _ = context(driver, kernels)
    for sequence in (1, 7):
        Program(made, plan, {"batch": 2, "sequence": sequence, "pages": 5, "pages_per_sequence": 2, "page_tokens": 16}, states).run()
    assert stub.launched() == ["flash_decode", "chunked"]
    first, second = (struct.unpack_from("<6i", call.packed, 40) for call in stub.calls("cuLaunchKernel"))
    assert first == (2, 16, 1, 12, 4, 12), "pages of a sequence, tokens of a page, tokens, strides of a token-major result"
    assert second == (2, 16, 7, 84, 4, 12)


def test_tensors_of_a_list_are_operands_of_their_own(stub: Stub, driver: Driver) -> None:
    orders = {name: torch.randperm(4).to(torch.uint8).view(1, 4) for name in ("of_keys", "of_values")}
    pointers = [pointer(name, "u8") for name in ("keys", "k_tables_0", "v_tables_0")]
    kernels = {"append": kernel("append", "append_packed_", launch("append", *pointers, integer("tokens", "sequence")))}
    new = ("batch", 1, "sequence", 4)
    buffers = [
        *(buffer(name, "state", ("pages", 1, "page_tokens", 4), "uint8") for name in ("keys_0", "values_0")),
        *(buffer(name, "input", new) for name in ("k", "v")),
        buffer("t", "input", ("batch", "pages_per_sequence"), "int32"),
        buffer("p", "input", ("batch", "sequence"), "int64"),
        *(buffer(name, "constant", (1, 4), "uint8") for name in orders),
    ]
    call = step("qcompile.append_packed_.default", "keys_0", "values_0", "k", "v", "t", "p", kernels={"": "append"})
    tables = {"k_tables": [{"buffer": "of_keys"}], "v_tables": [{"buffer": "of_values"}]}
    call = replace(call, args=(*call.args, "bfp4 g2 sorted", "bfp4 g2 sorted"), kwargs=tables)
    states = {name: torch.zeros(5, 1, 16, 4, dtype=torch.uint8) for name in ("keys_0", "values_0")}
    made, _ = context(driver, kernels, orders)
    sizes = {"batch": 2, "sequence": 3, "pages": 5, "pages_per_sequence": 2, "page_tokens": 16}
    Program(made, entry(buffers, [call], ()), sizes, states).run()
    addresses = [states["keys_0"].data_ptr(), *(made.constants.get(name).data_ptr() for name in orders)]
    assert struct.unpack_from("<3Qi", stub.calls("cuLaunchKernel")[0].packed) == (*addresses, 3)


def test_a_layout_is_applied_once_and_the_stored_form_is_not_uploaded(stub: Stub, driver: Driver) -> None:
    codes = torch.randint(0, 255, (8, 64), dtype=torch.uint8)
    reads: list[str] = []
    toy = kernel(
        "toy", "quantized_linear", launch("toy", pointer("x"), pointer("codes", "u8"), pointer("out")), layouts=(("codes", "split-half"),)
    )
    buffers = [buffer("x", "input", ("batch", "sequence", 128)), buffer("c", "constant", (8, 64), "uint8"), buffer("s", "constant", (8, 2))]
    outs = [buffer(name, "output", ("batch", "sequence", 8)) for name in ("z", "zz")]
    steps = [
        step("qcompile.quantized_linear.default", "x", "c", "s", None, None, 4, 64, out=item.name, kernels={"": "toy"}) for item in outs
    ]
    made, _ = context(driver, {"toy": toy})

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return {"c": codes, "s": torch.ones(8, 2)}[name]

    made.constants.read = read
    programs = [Program(made, entry([*buffers, *outs], steps, ("z", "zz")), {"batch": batch, "sequence": 1}, {}) for batch in (1, 2)]
    assert reads == ["c", "s"]
    programs[0].run()
    address = struct.unpack_from("<Q", stub.calls("cuLaunchKernel")[0].packed, 8)[0]
    laid_out = made.constants.get("c", "split-half")
    assert address == laid_out.data_ptr()
    assert torch.equal(laid_out, split_half(codes))


def test_an_integer_linear_runs_over_the_rows_of_its_codes(stub: Stub, driver: Driver) -> None:
    """Rows and buckets come from the codes, scales and zero points are operands, and 8-bit weights arrive signed."""
    weight = torch.tensor([[0, 127, 128, 255] * 4] * 8, dtype=torch.uint8)
    names = (pointer("codes", "i8"), pointer("scale"), pointer("w_codes", "i8"), pointer("w_scale"), pointer("out"), integer("n", "rows"))
    kernels = {
        name: kernel(name, "integer_linear", launch(name, *names), layouts=(("w_codes", "signed"),)) for name in ("one", "few", "many")
    }
    buffers = [
        buffer("a", "input", ("batch", "sequence", 16), "int8"),
        buffer("s", "input", ("batch", "sequence", 1)),
        buffer("w", "constant", (8, 16), "uint8"),
        buffer("ws", "constant", (8, 1)),
        buffer("z", "output", ("batch", "sequence", 8)),
    ]
    chosen = {"m1": "one", "m2-63": "few", "m64": "many"}
    call = step(
        "qcompile.integer_linear.default", "a", "s", None, "w", "ws", None, None, -1, 8, -1, {"dtype": "fp32"}, out="z", kernels=chosen
    )
    made, _ = context(driver, kernels, {"w": weight, "ws": torch.ones(8, 1)})
    for sequence in (1, 40, 64):
        Program(made, entry(buffers, [call], ("z",)), {"batch": 1, "sequence": sequence}, {}).run()
    assert stub.launched() == ["one", "few", "many"]
    assert [struct.unpack_from("<i", item.packed, 40)[0] for item in stub.calls("cuLaunchKernel")] == [1, 40, 64]
    assert made.constants.get("w", "signed").tolist()[0][:4] == [-128, -1, 0, 127]


def test_an_unknown_layout_is_refused(driver: Driver) -> None:
    toy = kernel("toy", "linear", launch("toy", pointer("weight")), layouts=(("weight", "spiral"),))
    made, _ = context(driver, {"toy": toy}, {"w": torch.zeros(4, 4)})
    plan = entry(
        [buffer("x", "input"), buffer("w", "constant", (4, 4)), buffer("z", "output")],
        [step("aten.linear.default", "x", "w", out="z", kernels={"": "toy"})],
        ("z",),
    )
    with pytest.raises(ArtifactError, match=r"layout 'spiral': expected one of split-half"):
        Program(made, plan, SIZES, {})


def test_views_cost_nothing_and_references_fill_their_buffers(driver: Driver) -> None:
    plan = entry(
        [
            buffer("x", "input", ("batch", 6)),
            buffer("left", "intermediate", ("batch", 3), alias="x"),
            buffer("right", "intermediate", ("batch", 3), alias="x"),
            buffer("e", "intermediate", ("batch", 3)),
            buffer("z", "output", ("batch", 3)),
        ],
        [
            step("aten.split.Tensor", "x", 3, -1, out=("left", "right")),
            step("aten.exp.default", "right", out="e"),
            step("aten.add.Tensor", "left", "e", out="z"),
        ],
        ("z",),
    )
    made, _ = context(driver, {})
    program = Program(made, plan, SIZES, {})
    assert len(program.actions) == 2
    x = torch.randn(2, 6)
    program.inputs["x"].copy_(x)
    program.run()
    torch.testing.assert_close(program.outputs[0], x[:, :3] + x[:, 3:].exp())


def test_lifetimes_share_memory_but_never_what_is_still_read(driver: Driver) -> None:
    """A chain of sums, with the first one read again at the end: three live at most, and a view keeps its base alive."""
    names = [f"n{index}" for index in range(6)]
    chain = [step("aten.add.Tensor", before, "x", out=after) for before, after in zip(["x", *names], names, strict=False)]
    buffers = [
        buffer("x", "input"),
        *(buffer(name, "intermediate") for name in names),
        buffer("view", "intermediate", ("batch", 4), alias="n0"),
        buffer("z", "output", ("batch", 4)),
    ]
    plan = entry(
        buffers,
        [*chain[:1], step("aten.select.int", "n0", 1, 0, out="view"), *chain[1:], step("aten.clone.default", "view", out="z")],
        ("z",),
    )
    made, _ = context(driver, {})
    program = Program(made, plan, SIZES, {})
    program.inputs["x"].fill_(1.0)
    program.run()
    assert program.outputs[0].eq(2.0).all()
    assert program.tensor("n5").eq(7.0).all()
    assert made.arena.take(0).numel() == 3 * 64


def test_planned_offsets_are_used_within_the_limits(driver: Driver) -> None:
    base = entry(
        [*XY, buffer("sum", "intermediate", offset=512), buffer("z", "output")],
        [ADD_STEP, step("aten.clone.default", "sum", out="z")],
        ("z",),
    )
    plan = replace(base, limits={"batch": 2, "sequence": 1}, arena_bytes=1024)
    made, _ = context(driver, KERNELS, {"y": Y})
    program = Program(made, plan, SIZES, {})
    arena = made.arena.take(0)
    assert (arena.numel(), program.tensor("sum").data_ptr() - arena.data_ptr()) == (1024, 512)


def test_a_view_with_gaps_is_copied_for_a_kernel_without_strides(stub: Stub, driver: Driver) -> None:
    plan = entry(
        [
            buffer("wide", "input", ("batch", "sequence", 8)),
            buffer("x", "intermediate", ("batch", "sequence", 4), alias="wide"),
            buffer("y", "constant", (2, 1, 4)),
            buffer("sum", "output"),
        ],
        [step("aten.slice.Tensor", "wide", -1, 4, 8, out="x"), ADD_STEP],
        ("sum",),
    )
    made, _ = context(driver, KERNELS, {"y": Y})
    program = Program(made, plan, SIZES, {})
    wide = torch.randn(2, 1, 8)
    program.inputs["wide"].copy_(wide)
    program.run()
    assert torch.equal(program.outputs[0], wide[..., 4:] + Y)
    assert program.obstacles == ["aten.add.Tensor (aten.add.Tensor): x is copied on cpu"]


def test_operands_outlive_the_program_that_made_them(driver: Driver) -> None:
    made, _ = context(driver, KERNELS, {"y": Y})
    program = Program(made, entry([*XY, buffer("sum", "output")], [ADD_STEP], ("sum",)), SIZES, {})
    x, out, action = program.inputs["x"], program.outputs[0], program.actions[0]
    x.fill_(1.0)
    del program, made
    action()
    assert torch.equal(out, Y + 1.0)


def test_missing_kernels_binaries_and_memory_are_named(stub: Stub, driver: Driver) -> None:
    plan = entry([*XY, buffer("sum", "output")], [ADD_STEP], ("sum",))
    with pytest.raises(EngineError, match=r"step aten.add.Tensor: expected a kernel of the artifact, got 'add'; compile the model again"):
        Program(context(driver, {}, {"y": Y})[0], plan, SIZES, {})
    with pytest.raises(
        EngineError, match=r"add_f32\): expected the binary 'toy.cubin' among those .* let through, got none; load with allow_native=True"
    ):
        Program(context(driver, KERNELS, {"y": Y}, {})[0], plan, SIZES, {})
    big = replace(ADD, launches=(replace(ADD.launches[0], shared_bytes=2048),))
    stub.limit_shared(1024)
    with pytest.raises(
        EngineError,
        match=r"kernel add \(add_f32\): expected at most 1024 bytes of shared memory, got 2048; compile for this device",
    ):
        Program(context(driver, {"add": big}, {"y": Y})[0], plan, SIZES, {})


def test_an_argument_of_an_unknown_kind_is_refused(driver: Driver) -> None:
    made, _ = context(driver, {})
    plan = entry([buffer("x", "input"), buffer("z", "output")], [step("aten.exp.default", {"pickle": "x"}, out="z")], ("z",))
    with pytest.raises(EngineError, match=r"step aten.exp.default: expected an argument of buffer, size, dtype, float, got 'pickle'"):
        Program(made, plan, SIZES, {})


def test_a_graph_replays_the_actions_in_order(stub: Stub, driver: Driver) -> None:
    made, queue = context(driver, KERNELS, {"y": Y})
    plan = entry(
        [*XY, buffer("sum", "intermediate"), buffer("z", "output")],
        [ADD_STEP, step("aten.clone.default", "sum", out="z", kernels={"": "clone"})],
        ("z",),
    )
    program = Program(made, plan, SIZES, {})
    before = len(stub.calls())
    captured = CapturedProgram(program, queue)
    warm_up = ["cuLaunchKernel", "cuMemsetD8Async", "cuLaunchKernel", "cuLaunchKernel"]
    names = [call.name.decode() for call in stub.calls()[before:] if call.name != b"cuCtxSetCurrent"]
    # The zeroing stands where its kernel stands, between the first kernel and the launches that read the workspace.
    assert names == [
        *warm_up,
        "cuStreamSynchronize",
        "cuStreamBeginCapture_v2",
        *warm_up,
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
    ]
    for value in (1.0, 2.0):
        program.inputs["x"].fill_(value)
        before = len(stub.calls())
        captured.run()
        assert [call.name for call in stub.calls()[before:]] == [b"cuGraphLaunch"]
        assert torch.equal(program.outputs[0], Y + value)
    captured.close()
    assert stub.calls()[-1].name == b"cuGraphExecDestroy"


def test_what_cannot_be_captured_is_named(stub: Stub, driver: Driver) -> None:
    made, queue = context(driver, KERNELS, {"y": Y})
    plan = entry(
        [*XY, buffer("sum", "intermediate"), buffer("z", "output")],
        [ADD_STEP, step("aten.exp.default", "sum", out="z", node="exp_3")],
        ("z",),
    )
    with pytest.raises(
        EngineError, match=r"decode: expected steps that a CUDA graph can hold, got exp_3 \(aten.exp.default\): it is computed on cpu"
    ):
        CapturedProgram(Program(made, plan, SIZES, {}), queue)
    program = Program(made, entry([*XY, buffer("sum", "output")], [ADD_STEP], ("sum",)), SIZES, {})
    stub.fail("cuLaunchKernel", 901, nth=2)
    with pytest.raises(
        EngineError, match=r"decode: expected steps that a CUDA graph can hold, got kernel add: .*CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    ):
        CapturedProgram(program, queue)
    program.run()
    driver.synchronize(queue.handle)
