"""The report: its numbers are the plan's, it needs no network, what comes from a model is text, and in a browser it can be used."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import EXAMPLES, GPT, MLP
from torch import nn

import autoshard
from autoshard import Plan, report
from autoshard.errors import InputError
from autoshard.memory import Point
from autoshard.pipeline_timeline import PipelineTimeline
from autoshard.program import facts
from autoshard.report.charts import busy_shares, lanes, thinned
from autoshard.report.markup import Quantity, element, escape, paragraph, table
from autoshard.report.sections import SECTIONS, Section
from autoshard.text import fold_name, human_bytes, human_seconds

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
with_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's dot")
_VOID = {"meta", "wbr", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, tables as rows of texts by caption, and whether all tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr" and "tbody" in self.open:
            self.tables[self._caption].append([])
        if tag == "td":
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
        if "caption" in self.open:
            self._caption = data
            self.tables[data] = []
        elif "td" in self.open:
            self.tables[self._caption][-1][-1] += data


def planned(template: str = "megatron", layers: int = 2) -> Plan:
    return autoshard.plan(GPT(layers), "dp=2,tp=2", *EXAMPLES["gpt"].batch(0), template=template, hardware="h100")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned()


@pytest.fixture(scope="module")
def full(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    return plan.report(path, memory=True, alternatives=("ddp", "fsdp"), other=planned("fsdp"))


def test_the_path_is_returned_and_the_page_is_sound(full: Path) -> None:
    page = Page(full.read_text())
    ids = [given["id"] for _, given in page.tags if given.get("id")]
    assert len(ids) == len(set(ids))
    links = [given["href"] for tag, given in page.tags if tag == "a" and given.get("href")]
    assert links == ["#content", *(f"#{section.name}" for section in SECTIONS if section.name != "stages")]
    assert {str(link).removeprefix("#") for link in links} <= set(ids)


def test_nothing_is_loaded(full: Path) -> None:
    """No address of another file, and a policy that forbids any."""
    text = full.read_text()
    page = Page(text)
    for tag, given in page.tags:
        assert not {"src", "srcset", "data", "action"} & set(given), (tag, given)
        assert str(given.get("href", "#")).startswith("#")
        assert not any(name.startswith("on") for name in given)
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|fetch\(|import\(|XMLHttpRequest", text)


def test_numbers_are_the_plans(plan: Plan, full: Path) -> None:
    page = Page(full.read_text())
    cost = plan.cost
    rows = {row[0]: row for row in page.tables["Time and traffic by module"]}
    for group in cost.by("module"):
        assert rows[group.name][-2:] == [f"{group.total_s / cost.total_s:.1%}", human_bytes(group.wire_bytes) if group.wire_bytes else ""]
    assert [row[0].replace(" @", "@").replace("-", "_") for row in page.tables["Sent by collective and axis"]] == [
        group.name for group in cost.by("kind") if "@" in group.name
    ]
    seconds = [row[-2] for row in page.tables["Time by kind"]]
    assert sorted(seconds) == sorted(human_seconds(group.total_s) for group in cost.by("kind") if group.total_s)
    assert human_seconds(plan.timeline().total_s) in page.texts
    peak = plan.memory()
    assert {row[0]: row[1] for row in page.tables["At the peak, by kind"]} == {k: human_bytes(v) for k, v in peak.at_peak.items() if v}
    assert any(f"At most {human_bytes(peak.peak_bytes)} at once" in text for text in page.texts)


def test_parameters_are_all_there_with_layout_and_reason(plan: Plan, full: Path) -> None:
    rows = Page(full.read_text()).tables["Parameters"]
    assert sum(int(row[1]) for row in rows) == len(plan.parameter_layouts)
    assert {row[0] for row in rows} == {fold_name(name) for name in plan.parameter_layouts}
    up = next(row for row in rows if row[0] == "blocks.*.up.weight")
    assert up[1:5] == ["2", "f32[64, 16]", "[32, 16]", "I@dp S(0)@tp"]
    assert up[6] == "all-reduce @dp: ranks read the parameter for different data, so its gradient is summed"


def test_every_collective_is_told_with_its_reason(plan: Plan, full: Path) -> None:
    rows = Page(full.read_text()).tables["Every collective, dearest first"]
    sent = [row for row in plan.cost.rows if row.is_per_step and row.axis]
    assert sum(int(row[3]) for row in rows) == sum(row.times for row in sent)
    assert all(row[-1] for row in rows)
    assert any("reads I@tp; each rank holds a term of a sum" in row[-1] for row in rows)


def test_alternatives_are_what_planning_finds(plan: Plan, full: Path) -> None:
    rows = Page(full.read_text()).tables["Templates on the same model and mesh"]
    assert [row[0] for row in rows] == ["this plan (megatron)", "ddp", "fsdp"]
    assert rows[0][2] == "the same"
    assert rows[2][1] == human_seconds(planned("fsdp").timeline().total_s)


def test_the_other_plan_is_compared(plan: Plan, full: Path) -> None:
    rows = Page(full.read_text()).tables["Layouts that change"]
    assert ["blocks.*.up.weight", "2", "parameter", "I@dp S(0)@tp", "S(0)@dp S(0)@tp"] in rows


def test_what_is_asked_for_is_left_out_otherwise(plan: Plan, tmp_path: Path) -> None:
    page = Page(plan.report(tmp_path / "small.html").read_text())
    assert "comparison" not in {given.get("id") for _, given in page.tags}
    assert {"At the peak, by kind", "Templates on the same model and mesh"}.isdisjoint(page.tables)
    assert any("memory=True" in text for text in page.texts)
    assert any("alternatives=True" in text for text in page.texts)


def test_loaded_plans_have_reports(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    page = Page(Plan.load(tmp_path / "plan.json").report(tmp_path / "loaded.html", alternatives=True).read_text())
    assert any("read from a file" in text for text in page.texts)


def test_what_does_not_fit_a_template_is_said(tmp_path: Path) -> None:
    plan = autoshard.plan(MLP(), "dp=2", (torch.zeros(8, 8),), hardware="h100", constraints={"up.weight": "S(0)@dp"})
    page = Page(plan.report(tmp_path / "report.html", alternatives=("ddp",)).read_text())
    rows = page.tables["Templates on the same model and mesh"]
    assert len(rows) == 2 or any(text.startswith("ddp: ") for text in page.texts)


def test_one_rank_that_sends_nothing(tmp_path: Path) -> None:
    plan = autoshard.plan(MLP(), "dp=1", (torch.zeros(8, 8),), hardware="h100")
    page = Page(plan.report(tmp_path / "report.html", memory=True, alternatives=True).read_text())
    assert "Nothing is sent between ranks." in page.texts


def test_memory_that_cannot_be_predicted_is_said(tmp_path: Path) -> None:
    plan = planned(layers=1)
    next(plan.program.nodes("parameter")).meta["autoshard"].name = "renamed"
    page = Page(plan.report(tmp_path / "report.html", memory=True).read_text())
    assert any("memory of this step cannot be predicted" in text for text in page.texts)


def test_pipelines_have_reports(tmp_path: Path) -> None:
    """A row per rank of `pp`, the bubble, and a sentence in place of templates."""
    plan = autoshard.plan(GPT(4), "pp=2,dp=2", *EXAMPLES["gpt"].batch(0), hardware="h100")
    timeline = plan.timeline()
    assert isinstance(timeline, PipelineTimeline)
    page = Page(plan.report(tmp_path / "report.html", alternatives=True).read_text())
    assert {"rank 0 of pp", "rank 1 of pp", f"{timeline.bubble:.1%}", "GPT on pp=2,dp=2"} <= set(page.texts)
    assert plan.program.pipeline is not None
    assert any(text.lower().startswith(plan.program.pipeline.described.lower()) for text in page.texts)
    assert any("pipeline stages" in text for text in page.texts)
    assert [len(row) for row in lanes(timeline).values()] == [sum(e.rank == rank for e in timeline.events) for rank in range(2)]


def test_bad_arguments_are_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"alternatives are templates: 'ddp', .* not 'zero'"):
        plan.report(tmp_path / "report.html", alternatives=("ddp", "zero"))
    with pytest.raises(InputError, match="cannot write the report"):
        plan.report(tmp_path / "nowhere" / "report.html")


def test_what_comes_from_a_model_is_text(tmp_path: Path) -> None:
    """Names and source lines that are HTML stay words, in tables, tooltips and in the notebook."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    plan = autoshard.plan(nn.Sequential(MLP(), MLP()), "dp=2", (torch.zeros(8, 8),), hardware="h100", template="ddp")
    plan.model_name = evil
    plan.program.note(evil)
    plan.program.source += f"# {evil}\n"
    for node in plan.program.nodes("parameter", "op"):
        known = facts(node)
        known.name = evil + known.name
        known.source = replace(known.source, module=evil + known.source.module, module_class=evil, text=evil)
    for text in (plan.report(tmp_path / "report.html").read_text(), plan._repr_html_()):
        page = Page(text)
        assert [tag for tag, _ in page.tags if tag == "img"] == []
        assert sum(tag == "script" for tag, _ in page.tags) == ("<main" in text)
        assert not any(name.startswith("on") for _, given in page.tags for name in given)
        assert any(evil in shown for shown in page.texts)


def test_without_dot_the_graph_is_its_text(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    page = Page(plan.report(tmp_path / "report.html").read_text())
    assert any("apt-get install graphviz" in text for text in page.texts)
    assert any("digraph autoshard" in text for text in page.texts)
    assert not any(given.get("class") == "stage" for _, given in page.tags)


@with_dot
def test_the_graph_has_tooltips(full: Path) -> None:
    text = full.read_text()
    assert re.search(r"<a><title>blocks_0_attn_qkv_linear: f32\[2, 8, 24\].*?models\.py:\d+", text)
    assert "xlink:title=" not in text


def test_a_section_is_added_in_one_place(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Section("pipeline", "Pipeline", lambda subject: paragraph(f"stages of {subject.plan.model_name}"))
    monkeypatch.setattr(report, "SECTIONS", (*SECTIONS, stages))
    page = Page(plan.report(tmp_path / "report.html").read_text())
    assert "stages of GPT" in page.texts
    assert ("a", {"href": "#pipeline"}) in page.tags


def test_notebooks_show_summary_and_parameters(plan: Plan) -> None:
    page = Page(plan._repr_html_())
    assert any("Predicted step" in text for text in page.texts)
    assert len(page.tables["Parameters"]) == len({(fold_name(name), layout) for name, layout in plan.parameter_layouts.items()})


def test_style_and_script_are_packaged() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("autoshard/**/__init__.py")}
    assert folders | {"autoshard.passes"} == set(found["packages"])
    suffixes = {pattern.removeprefix("*") for pattern in found["package-data"]["autoshard.report"]}
    assert {path.suffix for path in (ROOT / "autoshard" / "report").iterdir() if path.is_file()} - {".py"} == suffixes


def test_markup_escapes_once() -> None:
    assert escape(escape("<&>")) == "&lt;&amp;&gt;"
    assert element("p", "<b>", title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;</p>'
    shown = table("c", ("name", "#n"), [["<i>", Quantity(1.5, "1.5 s")]] * 3, most=2)
    assert shown.count("<tr><td>&lt;i&gt;</td>") == 2
    assert 'data-v="1.5"' in shown
    assert "1 more rows are left out" in shown


def test_intervals_add_up(plan: Plan) -> None:
    """What is drawn of a stream in intervals is as long as its events; no interval is more than full."""
    timeline = plan.timeline()
    for stream, busy_s in timeline.busy_s.items():
        shares = busy_shares([event for event in timeline.events if event.stream == stream], timeline.total_s, 37)
        together = [sum(column) for column in zip(*shares.values(), strict=True)]
        assert sum(together) * timeline.total_s / 37 == pytest.approx(busy_s)
        assert max(together, default=0.0) <= 1 + 1e-9


def test_thinning_keeps_the_peak() -> None:
    curve = [Point("forward", "", f"n{k}", ((k * 7919) % 1000,)) for k in range(2345)]
    kept = thinned(curve, 100)
    assert len(kept) == 100
    assert max(point.total_bytes for point in kept) == max(point.total_bytes for point in curve)
    assert thinned(curve[:50], 100) == curve[:50]


@pytest.mark.slow
def test_a_report_of_eight_billion_parameters_is_small(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, attn_implementation="sdpa")).to(torch.bfloat16)
        ids = torch.zeros(8, 4096, dtype=torch.long)
    plan = autoshard.plan(model, "dp=4,tp=2", (), {"input_ids": ids, "labels": ids}, hardware="h100", template="megatron_sp")
    path = plan.report(tmp_path / "report.html", memory=True, other=plan)
    Page(path.read_text())
    assert path.stat().st_size < 2e6


# ---------------------------------------------------------------------------------------------------------- in a browser

Browse = Callable[..., dict]
_DRIVER = """addEventListener("load", () => {
  const told = document.createElement("pre");
  let found;
  try { found = (() => { SCRIPT })(); } catch (error) { found = String(error); }
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
});"""


@pytest.fixture
def browse(full: Path, tmp_path: Path) -> Browse:
    """`browse(script)`: what `script`, the body of a function, returns in the page, as JSON.

    It runs after the page's own script, under the page's policy, to which its hash is added.
    """

    def run(script: str, width: int = 1200) -> dict:
        driver = _DRIVER.replace("SCRIPT", script)
        digest = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
        text = full.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ")
        text = text.replace("</body>", f"<script>{driver}</script></body>")
        path = tmp_path / "driven.html"
        path.write_text(text)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
        done = subprocess.run(
            [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=False
        )
        found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
        assert found, done.stderr[-2000:]
        told = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
        assert not isinstance(told, str), told
        return told

    return run


@in_a_browser
def test_tables_sort(browse: Browse) -> None:
    """Heads are buttons, so Enter and Space press them; numbers sort by size, not by their text."""
    found = browse("""
        const table = [...document.querySelectorAll("table")].find((t) => t.caption.textContent === "Parameters");
        const heads = [...table.tHead.rows[0].cells], at = heads.findIndex((h) => h.textContent.startsWith("bytes"));
        const column = (k) => [...table.tBodies[0].rows].map((row) => k ? Number(row.cells[k].dataset.v) : row.cells[k].textContent);
        const press = (k) => { heads[k].querySelector("button").click(); return [heads[k].ariaSort, column(k)]; };
        const buttons = heads.every((h) => h.querySelector("button").tabIndex === 0);
        return { down: press(at), up: press(at), name: press(0), others: heads[at].ariaSort, buttons };
    """)
    assert found["buttons"]
    assert found["down"][0] == "descending"
    assert found["down"][1] == sorted(found["down"][1], reverse=True)
    assert found["up"] == ["ascending", sorted(found["down"][1])]
    assert found["name"][0] == "ascending"
    assert found["others"] is None


@in_a_browser
@with_dot
def test_the_graph_zooms_and_searches(browse: Browse) -> None:
    found = browse("""
        const picture = document.querySelector(".picture"), svg = picture.querySelector("svg"), input = picture.querySelector("input");
        const width = () => Math.round(svg.getBoundingClientRect().width);
        const press = (name) => picture.querySelector(`[data-zoom=${name}]`).click();
        const stage = picture.querySelector(".stage"), key = (on, name) => on.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
        const at_first = width(); press("full"); const full = width(); press("in"); const larger = width();
        key(stage, "-"); const back = width(); press("fit"); const fit = width();
        input.value = "qkv s(0:3x16)@tp"; input.dispatchEvent(new Event("input"));
        const hits = [...svg.querySelectorAll(".found")].map((n) => n.textContent), told = picture.querySelector("output").value;
        key(input, "Enter"); const current = svg.querySelectorAll(".current").length, after = picture.querySelector("output").value;
        input.value = ""; input.dispatchEvent(new Event("input"));
        const left = svg.querySelectorAll(".found").length, box = stage.clientWidth;
        return { at_first, full, larger, back, fit, hits, told, current, after, left, box };
    """)
    assert found["at_first"] == found["fit"] <= found["box"]
    assert found["larger"] == pytest.approx(1.25 * found["full"], abs=2)
    assert found["back"] == pytest.approx(found["full"], abs=2)
    assert len(found["hits"]) == 1
    assert "qkv.weight" in found["hits"][0]
    assert (found["told"], found["after"]) == ("1 found", "1 of 1")
    assert (found["current"], found["left"]) == (1, 0)


@in_a_browser
def test_narrow_windows_scroll_tables_not_the_page(browse: Browse) -> None:
    found = browse(
        """
        const wide = [...document.querySelectorAll("main > section > *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1);
        return { page: document.documentElement.scrollWidth, window: innerWidth, wide: wide.map((e) => e.outerHTML.slice(0, 80)) };
        """,
        width=500,
    )
    assert found["page"] <= found["window"]
    assert found["wide"] == []
