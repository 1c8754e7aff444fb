"""The report page, in a browser: what a reader sees, hovers, filters, sorts and highlights."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.analysis.results import compute_results
from kvbench.reporting.page.page import write_page
from kvbench.reporting.page.summary import summary_of
from kvbench.store.folder import RunFolder
from kvbench.store.records import HUMAN, Cell, Failure, GenerationRecord, Output
from kvbench.store.rows import Row
from tests.helpers.page import numbers_of
from tests.helpers.records import ASKED, FULL_ASKED, LOCAL, SINKS, asked, made, sample

ROOT = Path(__file__).parents[2]
EVIL = "</script><img src=x onerror=document.title='owned'>"
"""Id and text of a document that would run if it were not shown as text."""
FULL = replace(SINKS, method="full", ratio_asked=None, role="control")
QUOTED = replace(LOCAL, method="snapkv", variant="kernel=\"3\" & '7'")
BROWSER = shutil.which("chromium") or shutil.which("chromium-headless-shell")
IN_CI = bool(os.environ.get("CI"))
browsing = pytest.mark.skipif(BROWSER is None and not IN_CI, reason="chromium is not installed")
SCREENSHOTS = ROOT / "reports" / "screenshots"


def written(path: Path) -> Path:
    """A run of one task that writes texts."""
    folder = RunFolder(path)
    path.mkdir()
    people = replace(FULL, method=HUMAN, task="minidocs-gen", protocol="generate", execution="streamed")
    cells = [people, *(replace(people, method=name, ratio_asked=ratio, role=role) for name, ratio, role in (
        ("full", None, "control"), ("snapkv", "0.5", "method")))]
    task = {
        "kind": "generation", "version": 1, "signature": "generate|P:4|G:2", "seq_len": 4, "new_tokens": 2,
        "documents": [EVIL],
    }
    (path / "run.json").write_text(json.dumps({
        "content": "c", "tasks": {people.setting: task}, "cells": [cell.__dict__ for cell in cells],
    }))
    texts, kept = ("as they wrote", "as full wrote", f"as it wrote {EVIL}"), (None, "9999", "9050")
    for cell, text, share in zip(cells, texts, kept, strict=True):
        folder.open_cell(cell)
        is_human = cell.method == HUMAN
        kinds = ("human", "after") if is_human else ("greedy",)
        outputs = [Output(kind, 0, (1, 2, 3, 4, 5, 6), text, False) for kind in kinds]
        folder.append(cell, [GenerationRecord(
            EVIL, "g", tuple(outputs), 4, 2, 2.0, 4, 4, 5.0, 5.0, 10.0, kept=share,
            **({"prefix": "one two three", "prefix_ids": (1, 2, 3, 4), "prefix_ends": (3, 7, 11, 13)}
               if is_human else {}),
        )])
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs with names that would break it if they were not escaped."""
    folder = tmp_path_factory.mktemp("Läufe & <b>")
    names = [EVIL, *(f"d{i}" for i in range(1, 20))]
    prose = made(folder / "prose", [(FULL, 0.0), (SINKS, 1.0), (LOCAL, 12.0), (QUOTED, 2.0)], documents=names)
    other = replace(ASKED, method="keydiff", ratio_asked="0.5")
    needles = asked(folder / "needles", [
        (FULL_ASKED, [sample(f"s{i}", [1.0], bin=f"depth={50 * (i % 3)}") for i in range(12)]),
        *((cell, [sample(f"s{i}", [float(i % 3 == place)], [[0.5, 0.7], [0.1, 0.3]], f"depth={50 * (i % 3)}")
                  for i in range(12)]) for place, cell in enumerate((ASKED, other))),
    ])
    texts = written(folder / "texts")
    runs = [(RunFolder(path), compute_results(RunFolder(path)).rows) for path in (prose, needles, texts)]
    return write_page(runs, [
        Failure("c", f"sinks fell {EVIL}", "Mend it."), Failure("d", "snapkv keeps too little.", left_out=True),
    ], folder)


@pytest.fixture(scope="module")
def content(page: Path) -> dict[str, Any]:
    return numbers_of(page)


def test_the_page_holds_every_number_with_its_recipe(page: Path, content: dict[str, Any]) -> None:
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    results = compute_results(RunFolder(page.parent / "prose")).rows
    for wanted in (row for row in results if row.metric == "ppl"):
        (mine,) = (
            row for row in rows if row["metric"] == "ppl" and content["methods"][row["method"]]["name"] == wanted.name
        )
        assert mine["value"] == pytest.approx(wanted.value, rel=1e-5)
        assert mine["delta_high"] == (None if wanted.delta is None else pytest.approx(wanted.delta_ci_high, rel=1e-5))
        assert content["signatures"][mine["signature"]] == wanted.signature
        assert content["recipes"][mine["recipe"]]["task"] == "minidocs"
    assert [method["name"] for method in content["methods"]][3] == "snapkv:kernel=\"3\" & '7'"


def test_nothing_in_a_run_can_become_code(page: Path) -> None:
    text = page.read_text()
    assert EVIL not in text  # neither in the markup nor in the data
    assert "sinks fell &lt;/script&gt;&lt;img src=x onerror=" in text
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy is not None
    assert policy.group(1).count("sha256-") == text.count("<script>") == 4
    assert "script-src" in policy.group(1)
    assert "unsafe-inline" not in policy.group(1).split("script-src")[1].split(";")[0]


def test_what_was_left_out_stands_behind_the_summary(page: Path) -> None:
    text = page.read_text()
    failed, summary, left_out = (text.index(f'<section id="{name}"') for name in ("failures", "summary", "left-out"))
    assert failed < text.index("sinks fell") < summary < left_out < text.index("snapkv keeps too little")


def test_the_summary_says_who_keeps_most(page: Path) -> None:
    """Full answers all 12; sinks and keydiff a third each, so that neither is ahead."""
    rows = compute_results(RunFolder(page.parent / "needles")).rows
    said = " ".join(summary_of(rows).sentences)
    assert "of the full cache's accuracy, sinks keeps 33 % (mean of 1 task, with 50 % of its bytes)" in said
    assert ", then keydiff 33 %" in said
    assert "sinks is ahead of keydiff on 0 of 1" in said


def test_the_summary_counts_what_is_significant_and_what_is_not_decided() -> None:
    row = Row(
        "minidocs", "prefix", "m", "sinks", 0.5, 0.5, None, None, "real", {}, 20, "ppl", 12.0, 11.0, 13.0, 20,
        "document", 2.0, 1.0, 3.0, 0.001, "full", 0, "s",
    )
    full = replace(row, method="full", ratio_asked=None, value=10.0, delta=None, p_value=None)
    other = replace(row, method="snapkv", value=11.0, delta=1.0, p_value=0.2)
    few = [replace(one, task="short", groups=4) for one in (full, row, other)]
    summary = summary_of([full, row, other, *few])
    assert summary.sentences == (
        "m, 0.5 removed: lowest perplexity: snapkv (2 of 2); 2 of 4 comparisons with the full cache are significant.",
        "m: 1 task with too few documents for any significance.",
    )
    first, second = summary.tasks
    assert first.sentences[0].startswith("Best, with the difference to the full cache: at 0.5 snapkv (+1.00 ±1.00)")
    assert "Too few documents to test: with 4 groups" in second.sentences[0]
    under = [replace(one, params={"under_floor": True}) for one in (full, row, other)]
    assert summary_of(under).sentences == (
        "m does not solve, even with the full cache, and ranks nothing by: minidocs.",
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert BROWSER is not None, "chromium is not installed"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in a browser, with what it asked for and complained about."""

    def __init__(self, browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("console", lambda message: self.errors.append(message.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(page.as_uri())

    def to(self, section: str) -> Any:
        """Scroll to a section, and wait until it is drawn."""
        place = self.tab.locator(f"#{section}")
        place.scroll_into_view_if_needed()
        place.locator(".plot-container, .tabulator-row, article").first.wait_for()
        return place

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.tab.locator(selector).all_inner_texts()]


@pytest.fixture(scope="module")
def opened(browser: Any, page: Path) -> Opened:
    return Opened(browser, page)


@browsing
def test_it_opens_at_once_and_asks_for_nothing(browser: Any, page: Path) -> None:
    tab = Opened(browser, page)
    for section in ("curves", "leaderboard", "needles", "survival", "texts", "all"):
        tab.to(section)
    assert tab.asked == [page.as_uri()]
    assert tab.errors == []
    assert tab.tab.title() != "owned"
    tab.tab.close()
    # Processor time of the page until it is loaded, since other tests may keep the processor busy.
    empty = browser.new_page()
    tools = empty.context.new_cdp_session(empty)
    tools.send("Performance.enable", {"timeDomain": "threadTicks"})
    empty.goto(page.as_uri())
    taken = {one["name"]: one["value"] for one in tools.send("Performance.getMetrics")["metrics"]}
    empty.close()
    assert 0.01 < taken["ScriptDuration"] + taken["LayoutDuration"] < taken["TaskDuration"] < 1


@browsing
def test_a_point_says_what_it_is(opened: Opened) -> None:
    opened.tab.evaluate("scrollTo(0, 0)")
    place = opened.to("curves")
    place.locator("select[name=task]").select_option(label="minidocs · block")
    point = place.locator(".scatterlayer .trace").nth(3).locator(".point").first
    point.hover(force=True)
    said = opened.tab.locator("#curves .hovertext").first.text_content()
    assert "snapkv:kernel=\"3\" & '7' 0.5" in said
    assert re.search(r"ppl: \d+\.\d\d \[", said)


@browsing
def test_a_method_is_highlighted_everywhere(opened: Opened) -> None:
    opened.to("curves")
    opened.to("leaderboard")
    opened.tab.locator("#methods button", has_text="local").click()
    faint = opened.tab.evaluate("document.querySelector('#curves .figure').data.map(t => [t.name, t.opacity])")
    assert {name: value for name, value in faint if value == 1} == {"local": 1}
    assert len(faint) == 4
    assert opened.texts("#leaderboard .tabulator-row.lit .tabulator-cell:first-child")[0].endswith("local")
    opened.tab.keyboard.press("Escape")
    assert opened.tab.locator(".lit").count() == 0


@browsing
def test_the_leaderboard_sorts_by_any_column(opened: Opened) -> None:
    opened.to("leaderboard")
    column = opened.tab.locator("#leaderboard .tabulator-col", has_text="minidocs · block")
    orders = []
    for _ in range(2):
        column.locator(".tabulator-col-title").click()
        names = opened.texts("#leaderboard .tabulator-row .tabulator-cell:first-child")
        orders.append([name.split()[-1] for name in names if name.split()[-1] in ("full", "sinks", "local")])
    assert orders == [["full", "sinks", "local"], ["local", "sinks", "full"]]


@browsing
def test_all_numbers_are_filtered_and_have_recipes(opened: Opened) -> None:
    opened.to("all")
    for title, wanted in (("method", "sinks"), ("metric", "ppl")):
        opened.tab.locator(f"#all .tabulator-col[tabulator-field={title}] input").press_sequentially(wanted)
        opened.tab.wait_for_timeout(400)
    lines = opened.tab.locator("#all .tabulator-row")
    assert lines.count() == 1
    lines.click()
    said = opened.tab.locator("#picked").inner_text()
    assert "sinks 0.5 on minidocs" in said
    assert "ppl:block|L:512" in said
    opened.tab.keyboard.press("Escape")
    assert not opened.tab.locator("#picked").is_visible()


@browsing
def test_what_was_kept_of_a_prefix_is_marked_and_texts_are_text(opened: Opened) -> None:
    place = opened.to("texts")
    place.locator("select[name=task]").select_option(label="minidocs-gen · m")
    assert f"snapkv 0.5\nas |it wrote {EVIL}" in opened.texts("#texts article")  # the bar: where it leaves full
    opened.tab.locator("#methods button", has_text=re.compile("snapkv$")).click()
    marks = opened.tab.locator("#texts .source span[title]")
    assert marks.all_text_contents() == ["one", " two", " thr", "ee"]
    assert [marks.nth(i).get_attribute("title") for i in range(4)] == ["100 %", "0 %", "56 %", "0 %"]
    assert opened.tab.title() != "owned"
    opened.tab.keyboard.press("Escape")


@browsing
def test_dark_and_narrow_pages_are_whole(browser: Any, page: Path) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width, scheme in ((400, "dark"), (800, "light"), (1280, "dark")):
        shown = Opened(browser, page, width, scheme)
        back = shown.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", back)[:3])) < 200
        assert dark == (scheme == "dark")
        for section in ("curves", "leaderboard", "needles", "survival", "texts", "all"):
            shown.to(section)
        assert shown.tab.evaluate("document.documentElement.scrollWidth") <= width
        shown.tab.screenshot(path=SCREENSHOTS / f"report-{width}-{scheme}.png", full_page=True)
        shown.tab.locator("#theme").click()
        assert shown.tab.evaluate("getComputedStyle(document.body).backgroundColor") != back
        assert shown.errors == []
        shown.tab.close()


def test_a_page_of_many_records_is_made_in_seconds_without_torch(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(400)]
    cells: list[tuple[Cell, float]] = [(FULL, 0.0)]
    cells += [(replace(SINKS, method=method, ratio_asked=ratio), float(place)) for place, (method, ratio) in enumerate(
        (method, ratio) for method in ("sinks", "local", "snapkv", "h2o", "tova", "knorm", "keydiff", "lagkv")
        for ratio in ("0.5", "0.7", "0.9"))]
    run = made(tmp_path / "many", cells, documents=names)
    assert len(cells) * len(names) == 10_000
    code = (
        "import sys, time; from pathlib import Path\n"
        "from kvbench.analysis.results import compute_results\n"
        "from kvbench.store.folder import RunFolder\n"
        "from kvbench.reporting.page.page import write_page\n"
        f"folder = RunFolder(Path({str(run)!r})); rows = compute_results(folder).rows; started = time.process_time()\n"
        "page = write_page([(folder, rows)], (), folder.path)\n"
        "print(time.process_time() - started, page.stat().st_size, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, size, has_torch = done.stdout.split()
    assert float(seconds) < 8
    assert int(size) < 6 * 2**20
    assert has_torch == "False"
