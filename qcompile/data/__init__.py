"""Text that ships with the package; LICENSE-PSF.txt says where it is from."""

from __future__ import annotations

from importlib import resources
from typing import Literal


def packaged_text(part: Literal["calibration", "evaluation"]) -> str:
    """English prose, about 60 kB; the two parts share no paragraph."""
    return resources.files("qcompile.data").joinpath(f"{part}.txt").read_text(encoding="utf-8")
