"""The report as text: one file, everything escaped, nothing asked of the network; and what its tables say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import qcompile
from qcompile.cli.app import app
from qcompile.cli.inspecting import read_facts
from qcompile.compiled import CompiledModel
from qcompile.dump.facts import Facts
from qcompile.dump.html import views
from qcompile.dump.html.content import Content
from qcompile.dump.html.page import SCRIPTS, asset, render, script_text, write_report
from qcompile.errors import ArtifactError, SourceError

PASS = {
    "index": 0, "name": "quantize-weights", "spec": "quantize-weights", "changed": True, "nodes_before": 10, "nodes_after": 1250,
    "seconds": 3.0, "max_error": 0.25, "bytes": 250_000, "exact": False, "sqnr_db": 14.25, "kl": 0.3415,
}  # fmt: skip
HOSTILE = '</script><img src=x onerror="alert(1)">'


class Page(HTMLParser):
    """Elements with their attributes, and the text of the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        {"script": self.scripts, "style": self.styles}.get(self._inside, []).append(data)

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    @property
    def data(self) -> Any:
        return json.loads(zlib.decompress(base64.b64decode(self.scripts[0])))


def test_compiling_writes_one_page_with_everything_in_it(reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    assert not [attributes for attributes in page.named("script") if "src" in attributes]
    assert [attributes["href"] for attributes in page.named("link")] == ["data:,"]
    assert all((attributes.get("href") or "").startswith("#") for attributes in page.named("a"))
    assert page.data["graphs"][0]["listing"] == "000_input"
    assert [record["name"] for record in page.data["passes"]] == [
        record["name"] for record in json.loads((reported / "passes.json").read_text())
    ]


def test_the_policy_lets_only_this_script_and_style_in(reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    policy = next(attributes["content"] for attributes in page.named("meta") if "http-equiv" in attributes) or ""
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (page.scripts[1], page.styles[0])
    ]
    assert f"script-src {digests[0]}" in policy
    assert f"style-src {digests[1]}" in policy
    assert policy.startswith("default-src 'none'")


def test_names_of_a_model_stay_text() -> None:
    record = {**PASS, "name": HOSTILE, "spec": HOSTILE}
    note = {"pass": HOSTILE, "node": HOSTILE, "reason": HOSTILE, "chosen": False}
    facts = Facts(Path(), "dump", HOSTILE, HOSTILE, HOSTILE, HOSTILE, [record], notes=[note], sizes={"target": HOSTILE})
    page = Page(render(Content(facts)))
    assert not list(page.named("img"))
    assert len(page.scripts) == 2
    assert page.data["title"] == HOSTILE
    link = views.node_link(HOSTILE, "001")
    assert link == "#node/%3C%2Fscript%3E%3Cimg%20src%3Dx%20onerror%3D%22alert%281%29%22%3E@001"


def test_the_script_makes_no_markup_and_asks_for_nothing() -> None:
    text = script_text()
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "XMLHttpRequest",
        "import(",
    ):
        assert forbidden not in text
    assert set(re.findall(r"https?://[^\"'\s]+", text + asset("report.css"))) == {"http://www.w3.org/2000/svg"}
    assert "</script" not in text
    assert max(len(asset(f"{name}.js").splitlines()) for name in SCRIPTS) <= 400
    assert max(map(len, text.splitlines())) <= 140


def test_every_node_is_sent_once(reported: Path) -> None:
    content = Content(read_facts(reported))
    sent = [node["id"] for graph in content.graphs for node in graph["new"]]
    assert len(sent) == len(set(sent))
    assert {number for graph in content.graphs for number in graph["order"]} == set(sent)
    assert content.input_bytes == content.facts.passes[0]["bytes"]


def test_an_artifact_has_a_report_of_what_it_holds(reported: Path, tmp_path: Path) -> None:
    size = write_report(read_facts(reported.parent / "artifact"), tmp_path / "report.html")
    assert size == (tmp_path / "report.html").stat().st_size < 5_000_000
    page = Page((tmp_path / "report.html").read_text())
    (graph,) = page.data["graphs"]
    assert graph["listing"].endswith("_final")
    whole = Page((reported / "report.html").read_text()).data
    names = {node["name"] for node in graph["new"]}
    last = {node["id"]: node["name"] for listing in whole["graphs"] for node in listing["new"]}
    assert names == {last[number] for number in whole["graphs"][-1]["order"]}
    assert {row["node"] for row in whole["coverage"]} <= {name for kernel in page.data["kernels"] for name in kernel["nodes"]}
    assert page.data["coverage"] == whole["coverage"]


def test_an_interrupted_dump_says_so(reported: Path, tmp_path: Path) -> None:
    for name in ("passes.json", "graphs.jsonl"):
        (tmp_path / name).write_text((reported / name).read_text())
    heading = json.loads((reported / "dump.json").read_text()) | {"complete": False}
    (tmp_path / "dump.json").write_text(json.dumps(heading))
    write_report(read_facts(tmp_path), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "interrupted: this dump ends early" in text
    assert len(Page(text).data["graphs"]) > 2
    assert "interrupted: this dump ends early" not in (reported / "report.html").read_text()


def test_the_command_writes_a_report(reported: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["inspect", str(reported), "--html", str(tmp_path / "a.html"), "--json"])
    assert json.loads(run.stdout) == {"report": str(tmp_path / "a.html"), "report_bytes": (tmp_path / "a.html").stat().st_size}


def test_a_report_that_cannot_be_made_is_named(reported: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"report .*/r.html: expected a file that can be written, got No such file .*; choose"):
        write_report(read_facts(reported), tmp_path / "nowhere" / "r.html")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        write_report(read_facts(tmp_path), tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_rows_of_the_timeline_follow_each_other() -> None:
    second = {**PASS, "index": 1, "changed": False, "nodes_before": 1250, "seconds": 1.0, "bytes": 250_000}
    start, first, idle = views.pass_rows([PASS, second], input_bytes=1_000_000)
    assert (start.number, start.nodes, start.bytes, start.share) == ("000", "10", "1 MB", 1000)
    assert (first.number, first.start, first.width, first.share) == ("001", 0, 750, 250)
    assert (first.delta, first.nodes, first.lossy, first.effect) == ("+1,240", "1,250", True, "SQNR 14.2 dB, KL 0.342")
    assert (idle.start, idle.width, idle.effect, idle.changed) == (750, 250, "", False)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"exact": True, "max_error": 3.2e-15}, "exact to 3e-15"),
        ({"exact": True, "max_error": 0.0}, "exact, bit for bit"),
        ({"exact": True, "max_error": None}, ""),
        ({"sqnr_db": None, "kl": None}, "max error 0.25"),
        ({"sqnr_db": None, "kl": None, "max_error": None}, "not measured"),
        ({"changed": False}, ""),
    ],
)
def test_effects_in_words(values: dict[str, Any], text: str) -> None:
    assert views.effect(PASS | values) == text


def test_a_time_too_short_to_see_has_a_bar_still() -> None:
    rows = views.pass_rows([{**PASS, "index": index, "seconds": time} for index, time in enumerate((0.0, 100.0, 0.0))])
    assert [(row.start, row.width) for row in rows[1:]] == [(0, 4), (0, 1000), (996, 4)]


def test_notebooks_show_tables_and_terminals_text(reported: Path) -> None:
    compiled: CompiledModel = qcompile.load(reported.parent / "artifact")
    report = compiled.report()
    assert isinstance(report, str)
    assert str(report).startswith("passes")
    page = Page(report._repr_html_())
    assert not page.scripts
    assert len(list(page.named("table"))) == 4
    classes = [attributes.get("class") for attributes in page.named("tr")]
    assert sum(name in ("changed", "idle", "changed lossy") for name in classes) == len(compiled.records) + 1
