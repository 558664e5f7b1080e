"""Draw the pictures of docs/reading-a-dump.md: python docs/draw_report.py demo-out/dump/report.html.

Needs Chromium and chromedriver; the pages are 1280 x 800.
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PICTURES = {
    "report-pipeline": "#pass/{rotate}",
    "report-diff": "#diff/{before}..{quantize}",
    "report-distributions": "#distributions/activations",
}
SIZE = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
NUMBERS = """
const rows = [...document.querySelectorAll('#view-pipeline tr.changed')];
const names = rows.map((row) => [row.dataset.number, row.querySelector('.name').textContent.trim()]);
const at = (name) => names.findIndex((pair) => pair[1] === name);
const number = (index) => names[Math.max(index, 0)][0];
return {rotate: number(at('rotate-hadamard')), quantize: number(at('quantize-weights')), before: number(at('rewrite-kv-cache'))};
"""


def main(report: Path) -> None:
    """Write one PNG per picture beside this script."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            _draw(browser, report)
        finally:
            browser.quit()


def _draw(browser: webdriver.Chrome, report: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
    browser.get(report.resolve().as_uri())
    while not browser.execute_script("return document.documentElement.dataset.ready"):
        time.sleep(0.05)
    numbers = browser.execute_script(NUMBERS)
    for name, place in PICTURES.items():
        browser.execute_script("location.hash = arguments[0]", place.format(**numbers))
        time.sleep(0.3)
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": False})
        (Path(__file__).parent / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
