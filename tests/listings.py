"""Comparing listings."""

from __future__ import annotations

import re


def without_logs(listing: str) -> str:
    """The listing without what was done to each constant: a saved one is the result of its log, which it therefore no longer has."""
    return re.sub(r" +\[(?:times|basis|plus|centred).*\]$", "", listing, flags=re.MULTILINE)
