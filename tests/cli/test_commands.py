"""Each command: what it hands on and what it prints."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile
from qcompile.codegen.cpp.build import instruction_sets
from qcompile.dump import blame as blame_room
from qcompile.dump import writer
from qcompile.dump.blame import KL, Blame, Cell, Step
from qcompile.quant.scheme_options import SchemeOptions
from tests.cli.fakes import CACHE, RECORDS, FakeModel

Invoke = Callable[..., Any]


def test_compile_hands_every_option_on(model: FakeModel, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(
        "compile", "m.gguf", "--target", "cpu-int4", "-o", tmp_path / "out", "--group-size", "32", "--asymmetric", "--ignore", "a",
        "--ignore", "re:b", "--quantize-head", "--quantize-embedding", "--disable-pass", "fold-constants", "--passes", "canonicalize",
        "--strict", "--check", "--dump", tmp_path / "d", "--revision", "v1", "--trust-remote-code", "--max-batch", "2",
        "--max-context", "64", "--calibration", "c.npy", "--num-calibration-samples", "5", "--max-seq-length", "7",
        "--weight-format", "nf4 g36 sym int8", "--activation-group-size", "-1", "--activation-asymmetric", "--activation-static",
        "--activation-clip", "0.9", "--matmul", "exact", "--head-format", "float", "--cache-keys", "int4 t32", "--cache-values", "int4",
        "--cache-sinks", "3", "--cache-window", "16", "--cache-before-positions", "--cache-bits", "3.5", "--prefill-chunk", "96",
        "--engine", "torch_cpu", "--instruction-sets", "avx2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    instruments = model.asked.pop("instruments")
    assert model.asked == {
        "arguments": ("m.gguf", "cpu-int4"), "recipe": "best", "passes": "canonicalize", "disable": ["fold-constants"], "strict": True,
        "dump": tmp_path / "d", "check": True, "group_size": 32, "symmetric": False, "ignore": ["a", "re:b"], "quantize_head": True,
        "quantize_embedding": True, "calibration": Path("c.npy"), "num_calibration_samples": 5, "max_seq_length": 7, "max_batch": 2,
        "max_context": 64, "revision": "v1", "trust_remote_code": True, "weight_format": "nf4 g36 sym int8", "activation_group_size": -1,
        "activation_symmetric": False, "activation_static": True, "activation_clip": 0.9, "matmul": "exact", "head_format": "float",
        "cache_keys": "int4 t32", "cache_values": "int4", "cache_sinks": 3, "cache_window": 16,
        "cache_before_positions": True, "cache_bits": 3.5, "prefill_chunk": 96, "engine": "torch_cpu", "instruction_sets": "avx2",
    }  # fmt: skip
    assert [type(item).__name__ for item in instruments] == ["StatusInstrument"]
    assert (tmp_path / "out" / "manifest.json").exists()
    assert "canonicalize" in result.stdout
    assert "4.25" in result.stdout


def test_compile_leaves_defaults_to_the_library(model: FakeModel, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("compile", "m", "-t", "cpu-fp32", "-o", tmp_path / "out", "--json")
    unset = ("check", "dump", "max_context", "calibration", "max_seq_length", *SchemeOptions.__annotations__)
    assert {model.asked[key] for key in unset} == {None}
    printed = json.loads(result.stdout)
    assert printed["weight_bytes"] == 1_000_000
    assert [row["name"] for row in printed["passes"]] == ["canonicalize", "idle"]
    assert printed["coverage"][0]["kernel"] == "torch_cpu.linear"


def test_a_wrong_option_of_the_scheme_is_an_error_before_the_model_is_read(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("compile", "nowhere.gguf", "-t", "cpu-w8a8", "-o", tmp_path / "out", "--activation-clip", "1.5")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: clip=1.5: expected a share of the range above 0 and at most 1")


def test_compile_refuses_an_existing_folder_before_the_work(model: FakeModel, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("compile", "m", "-t", "cpu-fp32", "-o", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}: expected a directory that does not exist yet; choose another, or replace it with")
    assert not model.asked
    assert invoke("compile", "m", "-t", "cpu-fp32", "-o", tmp_path, "--overwrite").exit_code == 0


def test_status_is_quiet_in_a_pipe(model: FakeModel, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("compile", "m", "-t", "cpu-fp32", "-o", tmp_path / "out").stderr == ""


def test_run_streams_text(model: FakeModel, invoke: Invoke) -> None:
    engine = ("--engine", "reference", "--kv-bytes", "4096", "--page-tokens", "8", "--allow-native")
    options = ("-n", "5", "--temperature", "0.5", "--stop", "x", *engine)
    result = invoke("run", "out", "--prompt", "The capital of France is", *options)
    assert result.stdout == "Paris\n"
    assert model.asked == {
        "arguments": (Path("out"),), "engine": "reference", "max_context": None, "kv_bytes": 4096, "page_tokens": 8, "allow_native": True,
        "prompt": "The capital of France is", "max_new_tokens": 5, "stream": True,
        "temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None, "stop": ("x",),
    }  # fmt: skip


def test_run_chat_wraps_the_prompt(model: FakeModel, invoke: Invoke) -> None:
    invoke("run", "out", "--chat", "--prompt", "Hello")
    assert model.asked["prompt"] == [{"role": "user", "content": "Hello"}]


def test_export_hands_every_option_on(model: FakeModel, invoke: Invoke, tmp_path: Path) -> None:
    options = ("--profile", "ort", "--opset", "23", "--external-data", "--accuracy-level", "4", "--genai", "--overwrite")
    result = invoke("export", "out", "-o", tmp_path / "m.onnx", *options, "--no-compare", "--json")
    assert model.asked == {
        "arguments": (tmp_path / "m.onnx",), "profile": "ort", "opset": 23, "external_data": True, "accuracy_level": 4, "genai": True,
        "overwrite": True, "compare": False,
    }  # fmt: skip
    printed = json.loads(result.stdout)
    assert (printed["bytes"], printed["error"], printed["opset"]) == (1_002_000, 4e-6, 23)
    assert "1 MB" in invoke("export", "out", "-o", tmp_path / "m.onnx").stdout
    refused = invoke("export", "out", "-o", tmp_path / "m.gguf", "--format", "gguf")
    assert (refused.exit_code, refused.stderr) == (2, "error: format 'gguf': expected one of onnx\n")


def test_eval_prints_the_four_keys(model: FakeModel, invoke: Invoke, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[0, 0, 1], [2, 2, 2]], dtype=np.int32))
    (tmp_path / "manifest.json").write_text("{}")
    result = invoke("eval", "out", "--tokens", tmp_path / "t.npy", "--reference", tmp_path, "--json")
    printed = json.loads(result.stdout)
    assert printed["tokens"] == 4
    assert (printed["kl"], printed["top1"]) == (0.0, 1.0)
    # Three of four next tokens repeat (logit 1 against four zeros), one does not.
    nll = math.log(math.e + 4) - 3 / 4
    assert printed["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)


def test_eval_compiles_a_reference_model_in_float(
    model: FakeModel, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "t.npy", np.zeros((1, 3), dtype=np.int64))
    seen: list[Any] = []

    def compiled(*arguments: Any, engine: str) -> FakeModel:
        seen.append((*arguments, engine))
        return FakeModel(scale=2.0)

    monkeypatch.setitem(vars(qcompile), "compile", compiled)
    result = invoke("eval", "out", "--tokens", tmp_path / "t.npy", "--reference", "m.gguf", "--json")
    assert seen == [("m.gguf", "cpu-fp32", "torch_cpu")]
    assert json.loads(result.stdout)["kl"] > 0.01


@pytest.mark.parametrize("content", [b"", b"no array", np.array([[{}]], dtype=object).dumps()])
def test_eval_never_unpickles(model: FakeModel, invoke: Invoke, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    result = invoke("eval", "out", "--tokens", tmp_path / "t.npy")
    assert result.exit_code == 2
    assert "t.npy: expected an integer array [windows, length] saved by numpy.save, got" in result.stderr


def test_eval_without_tokenizer_or_tokens_is_named(model: FakeModel, invoke: Invoke) -> None:
    result = invoke("eval", "out")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr
    assert "--tokens" in result.stderr


def test_inspect_artifact(model: FakeModel, invoke: Invoke) -> None:
    printed = json.loads(invoke("inspect", "out", "--json").stdout)
    assert printed["target"] == "cpu-int4"
    assert printed["passes"][0]["nodes_after"] == 12
    assert "fake" in invoke("inspect", "out").stdout


def test_inspect_shows_the_cache_of_every_layer(model: FakeModel, invoke: Invoke) -> None:
    printed = json.loads(invoke("inspect", "out", "--json").stdout)["cache"]
    assert [(row["layer"], row["keys"], row["bytes_per_sequence"]) for row in printed] == [(n, "int4 t32 asym", 51456) for n in range(3)]
    assert printed[0]["bits_per_number"] == pytest.approx(8 * (240 + 51456 / 4096) / 384)
    model.cache_layers = [CACHE[0], replace(CACHE[1], keys="int2 t32 asym", bytes_per_token=190)]
    lines = [line for line in invoke("inspect", "out").stdout.splitlines() if "asym" in line or "all 2" in line]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert [row[:6] for row in cells] == [
        ["0", "int4 t32 asym", "int4 g32 asym", "4", "32", "240 B"],
        ["1", "int2 t32 asym", "int4 g32 asym", "4", "32", "190 B"],
        ["all 2", "", "", "", "", "430 B"],
    ]
    model.cache_layers = []
    assert "bits per number" not in invoke("inspect", "out").stdout


def test_inspect_dump(invoke: Invoke, tmp_path: Path) -> None:
    writer.write_heading(tmp_path, {"model": "m", "target": "cpu-int4", "pipeline": "canonicalize,idle"}, complete=False)
    writer.write_records(tmp_path, RECORDS)
    printed = json.loads(invoke("inspect", tmp_path, "--json").stdout)
    assert printed["pipeline"] == "canonicalize,idle"
    assert [row["changed"] for row in printed["passes"]] == [True, False]
    assert "12 (-8)" in invoke("inspect", tmp_path).stdout


def test_bench_measures_prompt_and_what_follows(model: FakeModel, invoke: Invoke) -> None:
    printed = json.loads(invoke("bench", "out", "--prompt-tokens", "16", "--new-tokens", "3", "--json").stdout)
    assert printed["prefill_tokens_per_second"] > 0
    assert printed["decode_tokens_per_second"] > 0
    assert printed["peak_memory_bytes"] > 10_000_000
    assert model.engine.prompts == [16] * 4  # a warm-up and three that count
    assert model.engine.decoded == 1 + 3


def test_bench_beyond_the_cache_is_named(model: FakeModel, invoke: Invoke) -> None:
    result = invoke("bench", "out", "--prompt-tokens", "60", "--new-tokens", "5")
    assert result.exit_code == 2
    assert "bench: expected at most 64 tokens, got 60 of the prompt and 5 new; ask for fewer" in result.stderr


def test_bench_of_a_module_is_named(model: FakeModel, invoke: Invoke) -> None:
    model.is_causal_lm = False
    assert "bench: expected a causal language model, got a module; call it instead" in invoke("bench", "out").stderr


def test_passes_lists_each_with_a_line(invoke: Invoke) -> None:
    rows = {row["name"]: row for row in json.loads(invoke("passes", "--json").stdout)}
    assert {"canonicalize", "quantize-weights", "plan-memory"} <= set(rows)
    assert all(row["description"].endswith(".") for row in rows.values())
    assert "canonicalize" in invoke("passes").stdout


def test_targets_lists_each_with_its_formats(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["target"]: row for row in json.loads(invoke("targets", "--json").stdout)}
    assert rows["sm90-int4"] == {
        "target": "sm90-int4", "compute": "bf16", "weights": "int4 g64 sym fp16", "engine": "cuda", "instruction_sets": [],
    }  # fmt: skip
    assert rows["cpu-fp32"]["weights"] == "fp32"
    assert [rows[name]["engine"] for name in ("cpu-fp32", "onnx-int4", "reference-int8")] == ["native", "onnxruntime", "reference"]
    assert rows["cpu-fp32"]["instruction_sets"] == list(instruction_sets())
    assert "reference-int8" in invoke("targets").stdout
    monkeypatch.setenv("CXX", "none")
    assert "cpu-* is served by torch_cpu: there is no C++ compiler" in invoke("targets").stdout
    served = next(row for row in json.loads(invoke("targets", "--json").stdout) if row["target"] == "cpu-int4")
    assert (served["engine"], served["instruction_sets"]) == ("torch_cpu", [])


def test_an_artifact_is_built_where_it_is_to_run(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: compiled and saved, carried to a machine that trusts nothing, built there, and run without a word."""
    x = torch.randn(3, 24)
    made = qcompile.compile(torch.nn.Linear(24, 8), "cpu-int8", example_inputs=x)
    made.save(tmp_path / "out")
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "elsewhere"))
    rows = json.loads(invoke("inspect", tmp_path / "out", "--json").stdout)
    assert rows["engine"] == "native"
    assert [(row["built_here"], row["runs_here"]) for row in rows["libraries"]] == [(False, True)]
    assert "built here" in invoke("inspect", tmp_path / "out").stdout
    built = invoke("build", tmp_path / "out", "--json")
    assert built.exit_code == 0, built.output
    (row,) = json.loads(built.stdout)["libraries"]
    assert (row["built_here"], row["runs_here"], row["machine"]) == (True, True, platform.machine())
    assert (tmp_path / "out" / "kernels" / row["file"]).stat().st_size == row["bytes"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = qcompile.load(tmp_path / "out")
    assert loaded.engine.name == "native"
    assert torch.equal(loaded(x), made(x))
    refused = invoke("build", tmp_path / "out", "--instruction-sets", "sse2")
    assert (refused.exit_code, "instruction_sets: expected some of" in refused.stderr) == (2, True)
    monkeypatch.setenv("CXX", "none")
    refused = invoke("build", tmp_path / "out", "-o", tmp_path / "other")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: native kernels: expected a C++ compiler, got none: there is no C++ compiler ($CXX is 'none'")


def test_a_warning_is_one_line_on_standard_error(model: FakeModel, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> FakeModel:
        warnings.warn_explicit("served by reference", UserWarning, "qcompile/cli/running.py", 1)
        return model

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    monkeypatch.setattr("qcompile.load", load, raising=False)
    result = invoke("run", "out", "--prompt", "x")
    assert result.stderr == "warning: served by reference\n"
    assert result.stdout == "Paris\n"


def test_plan_hands_every_option_on(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Planned:
        def to_dict(self) -> dict[str, Any]:
            return {"size": {"total": 7}}

        def tables(self) -> list[str]:
            return ["total 7"]

    def planned(*arguments: Any, **options: Any) -> Planned:
        seen.update(options, arguments=arguments)
        return Planned()

    monkeypatch.setitem(vars(qcompile), "plan", planned)
    options = (
        "--target", "sm90-int4", "--recipe", "nearest", "--asymmetric", "--quantize-head", "--ignore", "a", "--ignore", "b",
        "--disable-pass", "fold-norms", "--calibration", "t.npy", "--max-batch", "4", "--max-context", "99", "--kv-bytes", "4096",
        "--device", "H200", "--device-bandwidth", "1e12", "--device-compute", "2e14", "--cache-bits", "3.5", "--matmul", "fast",
        "--engine", "reference", "--json",
    )  # fmt: skip
    printed = json.loads(invoke("plan", "config.json", *options).stdout)
    assert printed == {"size": {"total": 7}}
    assert [type(item).__name__ for item in seen.pop("instruments")] == ["StatusInstrument"]
    assert seen == {
        "arguments": ("config.json", "sm90-int4"), "recipe": "nearest", "symmetric": False, "quantize_head": True,
        "quantize_embedding": None, "ignore": ["a", "b"], "disable": ["fold-norms"], "calibration": Path("t.npy"), "max_batch": 4,
        "max_context": 99, "prefill_chunk": 512, "kv_bytes": 4096, "page_tokens": None, "device": "H200", "device_bandwidth": 1e12,
        "device_compute": 2e14, "cache_bits": 3.5, "matmul": "fast", "trust_remote_code": False, "engine": "reference",
    }  # fmt: skip
    assert invoke("plan", "config.json", "-t", "cpu-int4").stdout == "total 7\n"


def test_plan_of_what_cannot_be_read_is_named(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused = invoke("plan", tmp_path / "config.json", "-t", "cpu-int4")
    assert refused.exit_code == 2
    assert "config.json: expected JSON, got" in refused.stderr
    assert "scheme 'int5' is not served on cpu" in invoke("plan", tmp_path, "-t", "cpu-int5").stderr


def test_blame_hands_its_options_on_and_writes_into_a_dump(monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    cells = tuple(Cell(layer, "weights", "quantize-weights", f"layers.{layer}.w", "w", 0.3, 0.1, (layer,)) for layer in (1, 0))
    made = Blame("m", "cpu-int4", KL, 0.5, cells, (Step("fold-norms", 0.1, True, "linear_3", "first at linear_3"),), 0.1, 2, 9, 12, 256)
    monkeypatch.setitem(vars(qcompile), "blame", lambda *arguments, **options: asked.update({"arguments": arguments, **options}) or made)
    monkeypatch.setattr(blame_room, "require_dump", lambda directory: asked.update(dump=directory))
    np.savez(tmp_path / "inputs.npz", x=np.ones((2, 3), dtype=np.float32))
    result = invoke(
        "blame", "out", "--reference", "m.gguf", "--tokens", "t.npy", "--inputs", tmp_path / "inputs.npz", "--windows", "3", "--budget",
        "40", "--calibration", "c.npy", "--dump", tmp_path, "--top", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (inputs,) = asked.pop("inputs")
    assert inputs["x"].shape == (2, 3)
    assert asked == {
        "arguments": (Path("out"), "m.gguf"), "tokens": Path("t.npy"), "windows": 3, "budget": 40, "calibration": Path("c.npy"),
        "dump": tmp_path,
    }  # fmt: skip
    assert json.loads((tmp_path / "blame.json").read_text()) == made.to_dict()
    for shown in ("layers.1.w", "and 1 more", "40.0 %", "first at linear_3", "9 of at most 12"):
        assert shown in result.stdout
    printed = json.loads(invoke("blame", "out", "--reference", "m", "--json").stdout)
    assert (printed["total_kl"], printed["passes"][0]["node"], printed["cells"][1]["layer"]) == (0.5, "linear_3", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dump", "nowhere"), "nowhere: expected the directory of a dump, got nothing"),
        (("--inputs", "no.npz"), "saved by numpy.savez"),
    ],
)
def test_blame_refuses_what_is_no_dump_and_no_input(options: tuple[str, ...], message: str, invoke: Invoke) -> None:
    result = invoke("blame", "out", "--reference", "m", *options)
    assert result.exit_code == 2
    assert message in result.stderr
