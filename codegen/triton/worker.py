"""A process that compiles kernels with Triton: jobs as JSON on standard input, one result file per job.

Run by path, not as a module: it imports Triton and the standard library only, so it starts in half a second and neither torch
nor a driver is needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def load_function(source: Path, name: str) -> Any:
    """The function called `name` of a source file; Triton wants a function whose source is in a file."""
    spec = importlib.util.spec_from_file_location(f"kernel_{source.stem}", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def compile_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile one launch; writes `KEY.bin` and returns what the launcher has to know."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = folder / f"{job['file']}.py"
    attributes = {(place,): [["tt.divisibility", 16]] for place in job["divisible"]}
    ast_source = ASTSource(load_function(source, job["function"]), job["signature"], {}, attributes)
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    compiled = triton.compile(ast_source, target=GPUTarget("cuda", job["capability"], 32), options=options)
    scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
    if scratch:
        raise ValueError(f"expected a kernel without scratch memory (the launcher passes none), got one that wants {scratch} bytes")
    (folder / f"{job['key']}.bin").write_bytes(compiled.asm["cubin"])
    return {"key": job["key"], "symbol": compiled.metadata.name, "shared_bytes": compiled.metadata.shared}


def main() -> None:
    """Compile every job; a failure is reported with its job and does not stop the others."""
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    for job in request["jobs"]:
        try:
            result = compile_job(job, folder)
        except Exception as error:
            result = {"key": job["key"], "error": f"{type(error).__name__}: {error}"}
        (folder / f"{job['key']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
