"""The wheel and the sdist hold every package, the text and the type marker, and an installed wheel imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"codegen", "passes", "runtime"}
REPORT = "qcompile/dump/html"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy so that the checkout stays clean."""
    pytest.importorskip("build")
    work = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / name)
    for name in ("qcompile", *ROOMS):
        shutil.copytree(ROOT / name, work / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(work)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return work / "dist"


def _expected() -> set[str]:
    """What must be packaged, as paths: modules (also of rooms behind links), text and the type marker."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qcompile").rglob("*.py") if not ROOMS & {path.relative_to(ROOT).parts[1]}}
    behind = {f"qcompile/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    text = {f"qcompile/data/{name}" for name in ("calibration.txt", "evaluation.txt", "LICENSE-PSF.txt")}
    report = {str(path.relative_to(ROOT)) for folder in ("assets", "templates") for path in (ROOT / REPORT / folder).iterdir()}
    headers = {f"qcompile/{path.relative_to(ROOT)}" for path in (ROOT / "codegen" / "cpp").glob("*.h")}
    return modules | behind | text | report | headers | {"qcompile/py.typed"}


def test_wheel_holds_everything(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert _expected() <= names
    assert {name.split("/")[0] for name in names} == {"qcompile", "qcompile-0.1.0.dist-info"}


def test_sdist_holds_everything(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert _expected() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_installed_wheel_imports(built: Path, tmp_path: Path) -> None:
    """In a fresh environment that sees this one's libraries, but neither the checkout nor an editable install of it."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(next(built.glob("*.whl")))], check=True)
    # A folder named in a .pth file is searched, but its own .pth files (an editable install) are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = (
        "import qcompile, qcompile.passes.base, qcompile.codegen.reference, qcompile.runtime, qcompile.evaluation as e;"
        "print(qcompile.__file__, len(e.packaged_text('calibration')) > 1000, qcompile.Target.__name__)"
    )
    run = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == [str(site / "qcompile" / "__init__.py"), "True", "Target"], run.stderr
    assert (home / "bin" / "qcompile").is_file()
