"""Ahead-of-time builds: kernels to cubins without a GPU, in parallel processes, cached by content, gated before they are kept."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from qcompile.codegen.triton.gates import Usage, check_classes, inspect_binary, objection, triton_folder
from qcompile.codegen.triton.tiles import Architecture, architecture
from qcompile.errors import KernelBuildError
from qcompile.ir.lowered import Kernel, Launch
from qcompile.kept import cache_directory

WORKER = Path(__file__).with_name("worker.py")
KEY_VERSION = 2
"""Raised when what is measured of a binary changes, so that older cache entries are not taken."""


@dataclass(frozen=True)
class Binary:
    """One built launch: the cubin, its symbol, and what it takes."""

    cubin: bytes
    symbol: str
    shared_bytes: int
    usage: Usage

    @property
    def file_name(self) -> str:
        """Content-addressed: equal binaries share a file."""
        return f"{hashlib.sha256(self.cubin).hexdigest()}.cubin"


def kernel_cache() -> Path:
    """Where built kernels are kept between runs: `QCOMPILE_CACHE`/kernels, by default under ~/.cache/qcompile."""
    return cache_directory() / "kernels"


def build_kernels(
    kernels: Sequence[Kernel], arch: str, *, workers: int | None = None, cache: Path | None = None
) -> tuple[list[Kernel], dict[str, bytes]]:
    """Build every launch of every kernel for `arch` and check it.

    A launch that spills or asks for too much shared memory is built again with fewer stages or more warps (`easier`): how many
    registers a shape takes is known only once it is compiled.

    Args:
        kernels: as `TritonBackend.emit` made them.
        arch: `sm80`, `sm89`, `sm90` or `sm100`.
        workers: compiler processes at a time; by default one per core.
        cache: folder of earlier builds (`kernel_cache()` is the usual one), or None to build everything anew.

    Returns:
        The kernels with `binary`, `symbol`, `registers` and `shared_bytes` of their launches filled in; file name -> cubin.

    Raises:
        KernelBuildError: if Triton is missing, a kernel does not compile, or a binary does not pass the gates.
    """
    target = architecture(arch)
    finished = list(kernels)
    binaries: dict[str, Binary] = {}
    for step in range(len(EASIER) + 1):
        jobs = {key: job for kernel in finished for key, job in launch_jobs(kernel, target) if key not in binaries}
        binaries.update(obtain(jobs, workers or os.cpu_count() or 1, cache))
        if step < len(EASIER):
            finished = [easier(kernel, before, binaries, target, step) for kernel, before in zip(finished, kernels, strict=True)]
    finished = [finish(kernel, binaries, target) for kernel in finished]
    used = {launch.binary for kernel in finished for launch in kernel.launches}
    return finished, {binary.file_name: binary.cubin for binary in binaries.values() if binary.file_name in used}


EASIER: tuple[tuple[int, int], ...] = ((1, 2), (1, 1), (2, 0), (2, 1))
"""What is tried after a spill: factor of the warps, most stages (0: as they are)."""


def easier(kernel: Kernel, before: Kernel, binaries: dict[str, Binary], arch: Architecture, step: int) -> Kernel:
    """The kernel with the launches that did not pass changed to the next thing to try; `before` is how it was emitted."""
    factor, stages = EASIER[step]
    launches = []
    for launch, first in zip(kernel.launches, before.launches, strict=True):
        if launch_objection(kernel, launch, binaries, arch) is None:
            launches.append(launch)
        else:
            fewer = min(stages or first.num_stages, first.num_stages)
            launches.append(replace(launch, num_warps=min(16, first.num_warps * factor), num_stages=fewer))
    return replace(kernel, launches=tuple(launches))


def launch_objection(kernel: Kernel, launch: Launch, binaries: dict[str, Binary], arch: Architecture) -> str | None:
    """Why the binary of a launch does not pass the gates, or None."""
    binary = binaries[job_key(kernel, launch, arch)]
    return objection(binary.usage, binary.shared_bytes, arch, local_meant="local" in kernel.expects)


def obtain(jobs: dict[str, dict[str, Any]], workers: int, cache: Path | None) -> dict[str, Binary]:
    """The binary of each job: from the cache, or compiled and then kept there."""
    binaries = {key: binary for key in jobs if cache is not None and (binary := read_cached(cache, key)) is not None}
    built = compile_jobs([job for key, job in jobs.items() if key not in binaries], workers)
    if cache is not None:
        for key, binary in built.items():
            write_cached(cache, key, binary)
    return {**binaries, **built}


def launch_jobs(kernel: Kernel, arch: Architecture) -> Iterable[tuple[str, dict[str, Any]]]:
    """What a worker needs for each launch, under a key that depends on nothing else."""
    for launch in kernel.launches:
        key = job_key(kernel, launch, arch)
        yield (
            key,
            {
                "key": key,
                "label": f"{kernel.name}.{launch.function}",
                "source": kernel.source,
                "function": launch.function,
                "signature": {p.name: f"*{p.dtype}" if p.kind == "pointer" else "i32" for p in launch.parameters},
                "divisible": [place for place, p in enumerate(launch.parameters) if p.divisible_by % 16 == 0],
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                "capability": arch.capability,
            },
        )


def job_key(kernel: Kernel, launch: Launch, arch: Architecture) -> str:
    """Hash of everything a binary depends on: source, launch, architecture, compiler."""
    plain = replace(launch, grid=(1, 1, 1), binary="", symbol="", registers=0, shared_bytes=0)
    parts = (KEY_VERSION, triton_version(), arch.capability, kernel.source, repr(plain))
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def triton_version() -> str:
    """The installed version.

    Raises:
        KernelBuildError: if there is none.
    """
    triton_folder()
    return metadata.version("triton")


def compile_jobs(jobs: Sequence[dict[str, Any]], workers: int) -> dict[str, Binary]:
    """Compile in `workers` processes, each with its share of the jobs, and inspect what came out."""
    if not jobs:
        return {}
    with tempfile.TemporaryDirectory(prefix="qcompile-kernels-") as name:
        folder = Path(name)
        requests = [prepare(job, folder) for job in jobs]
        shares = [requests[start::workers] for start in range(min(workers, len(requests)))]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda share: run_worker(share, folder), shares))
            binaries = list(pool.map(lambda request: collect(request, folder), requests))
    return {request["key"]: binary for request, binary in zip(requests, binaries, strict=True)}


def prepare(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the job's source under a name that its content gives; the job without its source."""
    request = {name: value for name, value in job.items() if name != "source"}
    request["file"] = hashlib.sha256(job["source"].encode()).hexdigest()
    (folder / f"{request['file']}.py").write_text(job["source"])
    return request


def run_worker(share: list[dict[str, Any]], folder: Path) -> None:
    """One compiler process. Line information would put paths into the binary, and Triton's own cache is keyed on paths too."""
    environment = {
        **os.environ,
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_INTERPRET": "0",
    }
    request = json.dumps({"folder": str(folder), "jobs": share})
    # -P keeps this folder off the path: its module names (`source`, `cache` …) are not for others to import.
    command = [sys.executable, "-P", str(WORKER)]
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelBuildError(f"the kernel compiler ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


def collect(request: dict[str, Any], folder: Path) -> Binary:
    """Read back one compiled job.

    Raises:
        KernelBuildError: if it did not compile.
    """
    result = json.loads((folder / f"{request['key']}.json").read_text())
    if "error" in result:
        raise KernelBuildError(f"{request['label']}: does not compile: {result['error'][:1500]}")
    path = folder / f"{request['key']}.bin"
    return Binary(path.read_bytes(), result["symbol"], result["shared_bytes"], inspect_binary(path))


def finish(kernel: Kernel, binaries: dict[str, Binary], arch: Architecture) -> Kernel:
    """The kernel with its binaries entered, after the gates."""
    found: set[str] = set()
    launches = []
    for launch in kernel.launches:
        binary = binaries[job_key(kernel, launch, arch)]
        reason = launch_objection(kernel, launch, binaries, arch)
        if reason is not None:
            raise KernelBuildError(f"{kernel.name}.{launch.function}: {reason}")
        found |= binary.usage.classes
        launches.append(
            replace(
                launch,
                binary=binary.file_name,
                symbol=binary.symbol,
                registers=binary.usage.registers,
                shared_bytes=binary.shared_bytes,
            )
        )
    check_classes(kernel.name, kernel.expects, frozenset(found))
    return replace(kernel, launches=tuple(launches))


def read_cached(cache: Path, key: str) -> Binary | None:
    """An earlier build, or None if there is none or its files do not belong together."""
    try:
        record = json.loads((cache / f"{key}.json").read_text())
        cubin = (cache / f"{key}.cubin").read_bytes()
        if hashlib.sha256(cubin).hexdigest() != record["sha256"]:
            return None
        usage = record["usage"]
        return Binary(
            cubin, record["symbol"], record["shared_bytes"], Usage(usage["registers"], usage["local_bytes"], frozenset(usage["classes"]))
        )
    except (OSError, ValueError, KeyError):
        return None


def write_cached(cache: Path, key: str, binary: Binary) -> None:
    """Keep a build; the record comes last, so that a reader never finds it without its cubin."""
    cache.mkdir(parents=True, exist_ok=True)
    record = {
        "symbol": binary.symbol,
        "shared_bytes": binary.shared_bytes,
        "sha256": hashlib.sha256(binary.cubin).hexdigest(),
        "usage": {**asdict(binary.usage), "classes": sorted(binary.usage.classes)},
    }
    write_atomically(cache / f"{key}.cubin", binary.cubin)
    write_atomically(cache / f"{key}.json", json.dumps(record).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: a reader sees the whole file or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
