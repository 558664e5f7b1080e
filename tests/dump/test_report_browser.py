"""The report in headless Chromium: views, search, deep links, keys, colours; no error and no request."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from qcompile.dump.facts import facts_of_dump
from qcompile.dump.html.page import write_report
from qcompile.dump.reader import Dump

pytest.importorskip("selenium", reason="drives Chromium: pip install selenium")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,800",
)  # fmt: skip
DOWN = "model.layers.0.mlp.down_proj.weight"
LAYER = "layers 0\N{EN DASH}1"


@pytest.fixture(scope="module")
def dump(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump with an attribution as `qcompile blame` writes it, and the report of both."""
    directory = shutil.copytree(reported, tmp_path_factory.mktemp("browser") / "dump")
    shares: list[tuple[int | None, str, str, float]]
    shares = [(0, "weights", DOWN, 0.25), (1, "weights", "down_proj", 0.05), (0, "weights", "up_proj", 0.01)]
    shares.append((None, "cache", "keys", 0.002))
    cells = [
        {"layer": layer, "kind": kind, "pass": "quantize-weights", "node": node, "off": share, "alone": share, "share": share}
        for layer, kind, node, share in shares
    ]
    steps = [{"pass": "convert-dtype", "added": 0.0001, "exact": False, "node": "", "place": ""}]
    values = {"unit": "KL in nats per token", "total_kl": 0.3, "cells": cells, "passes": steps, "evaluations": 12, "quantizers": 4}
    (directory / "blame.json").write_text(json.dumps(values))
    write_report(facts_of_dump(directory), directory / "report.html")
    return directory


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser for all tests."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("expected chromium and chromedriver in PATH, found not both: `make browser` installs them on Debian")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    yield made
    made.quit()


class Browser:
    """The report as a user has it before them."""

    def __init__(self, chromium: webdriver.Chrome, dump: Path) -> None:
        self.chromium, self.dump = chromium, Dump.open(dump)
        self.address = (dump / "report.html").as_uri()

    def open(self, place: str = "") -> None:
        """Load the page anew at an address within it."""
        self.chromium.get("about:blank")
        self.chromium.get(f"{self.address}{place}")
        self.until(lambda: self.run("return document.documentElement.dataset.ready === 'true'"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.chromium.execute_script(script, *arguments)

    def until(self, condition: Any) -> Any:
        return WebDriverWait(self.chromium, 10, poll_frequency=0.02).until(lambda _: condition())

    def find(self, selector: str) -> WebElement:
        """The first element that is shown."""
        found: WebElement = self.until(lambda: next((item for item in self.all(selector) if item.is_displayed()), None))
        return found

    def all(self, selector: str) -> list[WebElement]:
        return list(self.chromium.find_elements("css selector", selector))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.chromium.switch_to.active_element.send_keys(key)

    @property
    def place(self) -> str:
        return str(self.run("return location.hash"))

    def number(self, label: str) -> str:
        """Of the listing that pass `label` made."""
        return next(listing.name for listing in self.dump.listings if listing.name.endswith(f"_{label}")).partition("_")[0]

    def severe(self) -> list[str]:
        return [entry["message"] for entry in self.chromium.get_log("browser")]

    def requests(self) -> list[str]:
        """What the page asked for, itself first."""
        messages = [json.loads(entry["message"])["message"] for entry in self.chromium.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["documentURL"].startswith("file:")]


@pytest.fixture
def browser(chromium: webdriver.Chrome, dump: Path) -> Iterator[Browser]:
    """The report, with the logs of earlier tests read away; nothing may be logged or asked for in any test."""
    chromium.get_log("browser"), chromium.get_log("performance")
    made = Browser(chromium, dump)
    yield made
    assert made.severe() == []
    asked = made.requests()
    assert asked
    assert {url for url in asked if not re.fullmatch(r"file:.*/report\.html(#.*)?|data:,", url)} == set()


def test_every_view_is_drawn(browser: Browser) -> None:
    browser.open()
    shown = {}
    for link in browser.all("nav a"):
        link.click()
        name = link.get_attribute("data-view")
        shown[name] = browser.find(f"#view-{name}").text
    assert "quantize-weights" in shown["pipeline"]
    assert "rms_norm" in shown["graph"]
    assert "the same" in shown["diff"]
    assert "max / rms" in shown["distributions"]
    assert "0.3 in all, 12 evaluations" in shown["sensitivity"]
    assert "embeddings stay in high precision" in shown["coverage"]
    assert "torch_cpu.quantized_linear" in shown["kernels"]
    assert "int4" in shown["memory"]


def test_the_timeline_dims_what_changed_nothing(browser: Browser) -> None:
    browser.open()
    rows = {row.get_attribute("data-number"): row.get_attribute("class") for row in browser.all("#view-pipeline tbody tr")}
    del rows["000"]
    assert [name.split()[0] == "changed" for name in rows.values()] == [row["changed"] for row in browser.dump.passes]
    number = browser.number("quantize-weights")
    browser.find(f"tr[data-number='{number}'] .name").click()
    assert browser.place == f"#pass/{number}"
    assert "dequantize" in browser.find("#inspector").text


def test_search_finds_a_node(browser: Browser) -> None:
    browser.open()
    browser.press("/", *"layers.1 down_proj codes")
    results = browser.until(lambda: [item.text for item in browser.all("#results li .title")])
    assert results == ["model.layers.1.mlp.down_proj.weight.codes"]
    browser.press(Keys.ENTER)
    name = "model_layers_1_mlp_down_proj_weight_codes"
    browser.until(lambda: browser.place.startswith(f"#node/{name}@"))
    assert browser.find("#view-graph a.node[aria-current]").get_attribute("data-name") == name
    assert browser.find("#inspector h2").text == results[0]


def test_search_says_when_nothing_is_called_that(browser: Browser) -> None:
    browser.open()
    browser.press("/", *"no-such-thing")
    assert browser.find("#results .none").text == "Nothing is called that."
    browser.press(Keys.ESCAPE)
    assert not browser.all("#results:not([hidden])")


def test_alike_layers_are_one(browser: Browser) -> None:
    browser.open(f"#graph/{browser.number('raise-patterns')}")
    section = browser.find("#view-graph details.folded")
    assert section.find_element("css selector", "summary b").text == LAYER
    first = [row.get_attribute("data-name") for row in section.find_elements("css selector", "a.node")]
    section.find_element("css selector", "option[value='layer 1']").click()
    second = [row.get_attribute("data-name") for row in section.find_elements("css selector", "a.node")]
    assert len(first) == len(second)
    assert not set(first) & set(second)
    browser.find("#view-graph .toggle input").click()
    titles = [title.text for title in browser.all("#view-graph summary b")]
    assert {"layer 0", "layer 1"} <= set(titles)
    assert LAYER not in titles


def test_the_diff_shows_what_a_pass_changed(browser: Browser) -> None:
    before, after = browser.number("raise-patterns"), browser.number("quantize-weights")
    browser.open(f"#diff/{before}..{after}")
    assert browser.find("#view-diff details.folded summary b").text == LAYER
    added = [row.text for row in browser.all("#view-diff .pair.added .side:last-child .text")]
    assert any("dequantize(" in text for text in added)
    pair = next(row for row in browser.all("#view-diff .pair.changed") if "aten.linear" in row.text)
    marks = [mark.text for mark in pair.find_elements("css selector", ".side:last-child mark")]
    assert any("dequantize" in mark for mark in marks)
    names = [{node["name"] for node in listing.nodes} for listing in browser.dump.listings if listing.name.startswith((before, after))]
    browser.find("#view-diff .toggle input").click()
    gone, come = (
        {side.get_attribute("data-name") for kind in kinds for side in browser.all(f"#view-diff .pair.{kind} a.side:{place}-child")}
        for kinds, place in ((("removed", "replaced"), "first"), (("added", "replaced"), "last"))
    )
    assert (gone, come) == (names[0] - names[1], names[1] - names[0])


def test_a_diff_steps_from_pass_to_pass(browser: Browser) -> None:
    numbers = [listing.name.partition("_")[0] for listing in browser.dump.listings]
    browser.open(f"#diff/{numbers[0]}..{numbers[1]}")
    browser.press("]")
    browser.until(lambda: browser.place == f"#diff/{numbers[1]}..{numbers[2]}")
    browser.press("[")
    browser.until(lambda: browser.place == f"#diff/{numbers[0]}..{numbers[1]}")


def test_a_deep_link_lands_on_a_node_and_its_provenance(browser: Browser) -> None:
    node = next(node for node in browser.dump.listings[-1].nodes if node["operator"] == "quantized_linear" and node["layer"] == 1)
    browser.open(f"#node/{quote(node['name'])}@{browser.dump.listings[-1].name}")
    row = browser.find("#view-graph a.node[aria-current]")
    assert row.get_attribute("data-name") == node["name"]
    box = browser.run("const box = arguments[0].getBoundingClientRect(); return [box.top, box.bottom]", row)
    assert 90 < box[0] < box[1] <= 800
    steps = {step.find_element("css selector", ".step").text: step.text for step in browser.all("#inspector .chain > li")}
    assert list(steps) == ["source", "traced", "passes", "kernel"]
    assert node["source"] in steps["source"]
    assert node["origins"][0] in steps["traced"]
    assert "quantize-weights" in steps["passes"]
    assert "torch_cpu.quantized_linear" in steps["kernel"]


@pytest.mark.parametrize(
    ("place", "heading"),
    [("#kernel/torch_cpu.quantized_linear", "torch_cpu.quantized_linear"), ("#pass/001", "canonicalize"), ("#node/nothing@001", "nothing")],
)
def test_other_deep_links(browser: Browser, place: str, heading: str) -> None:
    browser.open(place)
    assert browser.find("#inspector h2").text == heading


def test_constants_tell_what_was_done_to_them(browser: Browser) -> None:
    name = "model.layers.0.mlp.down_proj.weight.codes"
    browser.open(f"#node/{name}@{browser.number('quantize-weights')}")
    record = next(node for node in browser.dump.listings[-1].nodes if node["constant"] == name)
    assert [entry.text for entry in browser.all("#inspector .log code")] == record["log"]
    assert record["log"]
    assert len(browser.all("#inspector svg.chart")) == 2


def test_keys_do_what_a_mouse_does(browser: Browser) -> None:
    browser.open()
    browser.press("2")
    browser.until(lambda: browser.place == "#graph")
    browser.find("#view-graph summary").send_keys(Keys.ARROW_DOWN)
    focused = browser.chromium.switch_to.active_element
    assert focused.tag_name == "summary"
    opened = focused.find_element("xpath", "..").get_attribute("open")
    focused.send_keys(Keys.ARROW_LEFT if opened else Keys.ARROW_RIGHT)
    assert (focused.find_element("xpath", "..").get_attribute("open") is None) == (opened is not None)
    browser.press(Keys.END)
    name = browser.chromium.switch_to.active_element.get_attribute("data-name")
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.place.startswith(f"#node/{name}@"))
    assert browser.find("#inspector")
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.all("#inspector:not([hidden])"))
    browser.press("?")
    assert browser.find("#keys h2").text == "Keys"
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.all("#keys[open]"))


def test_focus_is_seen_and_everything_has_a_name(browser: Browser) -> None:
    browser.open("#diff")
    browser.press("/")
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    nameless = "[...document.querySelectorAll('button, input, select, nav, aside, section, [role=img]')]"
    label = "item.getAttribute('aria-label') || item.textContent.trim() || item.closest('label')"
    assert browser.run(f"return {nameless}.filter((item) => !({label}) && item.id !== 'inspector').map((item) => item.outerHTML)") == []


def test_a_cell_of_the_heat_map_is_explained(browser: Browser) -> None:
    browser.open("#sensitivity")
    cells = browser.all("#view-sensitivity rect[data-cell]")
    assert [cell.get_attribute("aria-label") for cell in cells][:2] == ["weights, layer 0: 0.26", "weights, layer 1: 0.05"]
    assert cells[0].get_attribute("fill") != cells[1].get_attribute("fill")
    cells[0].click()
    assert browser.find("#view-sensitivity [role=status]").text == f"weights, layer 0: 0.26 — {DOWN} 0.25; up_proj 0.01"
    browser.find("#view-sensitivity [role=status] a").click()
    assert browser.find("#inspector h2").text == DOWN


def test_dark_and_light(browser: Browser) -> None:
    def ground() -> str:
        return str(browser.run("return getComputedStyle(document.body).backgroundColor"))

    def prefer(scheme: str) -> None:
        browser.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    prefer("light")
    browser.open()
    light = ground()
    prefer("dark")
    dark = ground()
    assert (light, dark) == ("rgb(247, 247, 245)", "rgb(20, 22, 26)")
    browser.press("t")
    assert (browser.find("#theme").text, ground()) == ("light", light)
    browser.find("#theme").click()
    prefer("light")
    assert (browser.find("#theme").text, ground()) == ("dark", dark)
    browser.open()
    assert ground() == dark  # remembered
    browser.find("#theme").click()
    assert (browser.find("#theme").text, ground()) == ("auto", light)


Line = dict[str, Any]
NODE = {
    "op": "call", "constant": None, "type": "fp32[8]", "format": "", "source": "m.py:1", "origins": [], "passes": [], "log": [],
    "inputs": [], "bytes": None, "layer": None, "folded": "",
}  # fmt: skip


def _calls(operator: str, first: int, count: int) -> list[Line]:
    numbered = [(first + number, f"{operator}_{number}") for number in range(count)]
    calls = [
        {"id": number, "name": name, "operator": f"aten.{operator}", "call": f"%{name} = aten.{operator}(%x)"} for number, name in numbered
    ]
    return [NODE | call for call in calls]


def _written(directory: Path, *graphs: list[Line]) -> Path:
    """A dump of these graphs: the input, and what `canonicalize` made of it."""
    heading = {"format": 1, "qcompile": "0", "complete": False, "model": "made up", "target": "cpu-int4", "pipeline": "canonicalize"}
    record = {
        "index": 0, "name": "canonicalize", "spec": "canonicalize", "changed": True, "nodes_before": 3000, "nodes_after": 3000,
        "seconds": 1.0, "max_error": None, "bytes": 0, "listing": "001_canonicalize.txt",
    }  # fmt: skip
    listings = zip((("000_input", None), ("001_canonicalize", 0)), graphs, strict=False)
    lines = [{"listing": name, "pass": index, "new": nodes, "order": [node["id"] for node in nodes]} for (name, index), nodes in listings]
    (directory / "dump.json").write_text(json.dumps(heading))
    (directory / "passes.json").write_text(json.dumps([record]))
    (directory / "graphs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(facts_of_dump(directory), directory / "report.html")
    return directory


def test_what_is_not_the_same_in_alike_layers_is_marked(browser: Browser, tmp_path: Path) -> None:
    constants = [
        NODE
        | {"id": layer, "name": f"w_{layer}", "op": "constant", "constant": f"layers.{layer}.w", "call": "", "layer": layer, "log": [log]}
        for layer, log in enumerate(("hadamard", "hadamard", "signs"))
    ]
    made = Browser(browser.chromium, _written(tmp_path, constants))
    made.open("#graph")
    assert made.find("#view-graph details.folded summary").text.split("\n") == [
        "layers 0\N{EN DASH}2",
        "3 alike",
        "1 node each",
        "1 node not the same in all",
    ]
    assert made.find("#view-graph a.node .differs").get_attribute("title") == "log: hadamard in 0\N{EN DASH}1; signs in 2"


def test_three_thousand_nodes_are_compared_quickly(browser: Browser, tmp_path: Path) -> None:
    """Every node of a graph without layers is renamed: the worst that a diff can meet."""
    wide = Browser(browser.chromium, _written(tmp_path, _calls("relu", 0, 3000), _calls("gelu", 3000, 3000)))
    wide.open()
    draw = "const begun = performance.now(); location.hash = '#diff/000..001'; dispatchEvent(new Event('hashchange')); "
    took = wide.run(draw + "document.body.offsetHeight; return performance.now() - begun")
    assert wide.find("#view-diff .sum .added").text == "+3000"
    assert took < 2000  # milliseconds; 60 on an idle core
    assert len(wide.all("#view-diff .pair")) == 400
    wide.find("#view-diff .rows > button.more:last-child").click()
    assert len(wide.all("#view-diff .pair")) == 800
    wide.run("location.hash = '#diff/000..001?node=gelu_1500@001'")
    assert wide.find("#view-diff a.side[aria-current]").get_attribute("data-name") == "gelu_1500"
