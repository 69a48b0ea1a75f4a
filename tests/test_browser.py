"""Every kind of page in a real browser: no errors, no requests, the keyboard, phone and desktop, light and dark."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from comparison_runs import noisy_rise, write_run
from PIL import Image
from reporting_runs import CAPTIONS, make_run

from pcpo_fast.comparison import ComparisonSettings, compare_runs, write_comparison
from pcpo_fast.evaluation.candidates import Candidate
from pcpo_fast.evaluation.evaluation_page import evaluation_page
from pcpo_fast.evaluation.image_sets import folder_of_images
from pcpo_fast.evaluation.metrics import MetricColumn
from pcpo_fast.evaluation.preference import write_preference
from pcpo_fast.evaluation.result import Evaluation, RewardColumn
from pcpo_fast.evaluation.votes import win_rates
from pcpo_fast.prompts import Prompt
from pcpo_fast.reporting.metrics_file import read_metrics
from pcpo_fast.reporting.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES, COUNT = ("base", "tuned", "other"), 2


def evaluation(folder: Path) -> Evaluation:
    """Three candidates, four prompts, two images of each, larger than what a page shows pixel by pixel."""
    generator = np.random.default_rng(0)
    values = {name: generator.normal(0.5 + 0.1 * i, 0.1, 8).tolist() for i, name in enumerate(NAMES)}
    sets = []
    for name in NAMES:
        (folder / name).mkdir()
        for i in range(8):
            shade = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(shade).resize((300, 300)).save(folder / name / f"{i}.png")
        sets.append(folder_of_images(folder / name, name, "--checkpoint"))
    candidates = [Candidate(name, name, "images", f"images/{name}", 1.0, None, None) for name in NAMES]
    diversity = MetricColumn.diversity("pixel", "pixels", {name: values[name][::2] for name in NAMES})
    reward = RewardColumn("caption_match", values, COUNT)
    prompts = [Prompt(text, {}) for text in CAPTIONS[:4]]
    return Evaluation(prompts, COUNT, 0, candidates, sets, None, [reward], [diversity], [], ["A note."])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    result = evaluation(folder)
    (folder / "evaluation.html").write_text(evaluation_page(result, 4), encoding="utf-8")
    preference, _ = write_preference(result, ("base", "tuned"), folder)
    runs = {
        name: [
            write_run(folder / name / str(seed), noisy_rise(0.1, seed), seed=seed, epochs=6, every=3, credit__rule=name)
            for seed in range(2)
        ]
        for name in ("native", "proportionate")
    }
    written = write_comparison(compare_runs(runs, ComparisonSettings()), folder / "compared")
    return {
        "report": write_report(make_run(folder / "run", epochs=6, every=2)),
        "evaluation": folder / "evaluation.html",
        "comparison": next(path for path in written if path.suffix == ".html"),
        "preference": preference,
    }


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def wait_for_charts(page: "Page") -> None:
    """A page's policy forbids what Playwright's own waiting for functions does."""
    for chart in page.locator(".chart").all():
        chart.locator("canvas").first.wait_for()


@pytest.fixture
def opened(browser: "Browser", pages: dict[str, Path]) -> Iterator[Callable[..., "Page"]]:
    """Opens a page; at the end, none may have asked for anything, or complained."""
    contexts, complaints, requests = [], [], []

    def open_page(kind: str, width: int = 1280) -> "Page":
        phone = width < 500
        context = browser.new_context(viewport={"width": width, "height": 800}, has_touch=phone, is_mobile=phone)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: requests.append(asked.url))
        page.goto(pages[kind].as_uri())
        wait_for_charts(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "blob:")) and "/pages" not in url] == []


@pytest.mark.parametrize("kind", ["report", "evaluation", "comparison", "preference"])
def test_a_page_fits_and_shows_its_charts_in_the_reader_s_colours(opened: Any, kind: str) -> None:
    page = opened(kind, 390)
    for width, scheme, paper in ((390, "light", "rgb(246, 247, 249)"), (1280, "dark", "rgb(16, 18, 22)")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        wait_for_charts(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        widths = "all => all.map(one => one.getBoundingClientRect().width)"
        assert max(page.eval_on_selector_all(".chart, img", widths)) <= width
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert not any(page.eval_on_selector_all(".table", "all => all.map(one => one.scrollWidth > one.clientWidth)"))
    assert (page.locator(".chart").count() == 0) == (kind == "preference")


def test_a_table_that_goes_on_beyond_the_edge_of_a_phone_shows_it(opened: Any) -> None:
    """A shadow at the right edge, which is gone at the table's end, and the tools of charts fit."""
    page = opened("comparison", 390)
    table = page.locator(".table").first
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")

    def corner(side: str) -> int:
        """The lightness near an edge, above the words of the header."""
        with Image.open(io.BytesIO(table.screenshot())) as picture:
            grey = picture.convert("L")
            return int(grey.getpixel((2 if side == "left" else grey.width - 3, 14)))  # type: ignore[arg-type]

    assert (corner("left"), corner("right") < 240) == (255, True)
    table.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert (corner("left") < 240, corner("right")) == (True, 255)
    for chart in page.locator(".chart").all():
        outer, tools = chart.bounding_box(), chart.locator(".bk-Toolbar").bounding_box()
        assert outer["x"] <= tools["x"] and tools["x"] + tools["width"] <= outer["x"] + outer["width"]


def test_a_chart_changes_with_the_reader_s_setting_and_says_its_values(opened: Any) -> None:
    page = opened("report")
    chart = page.locator(".chart").first
    before = chart.screenshot()
    page.emulate_media(color_scheme="dark")
    wait_for_charts(page)
    assert chart.screenshot() != before
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.move(box["x"] + 0.51 * box["width"], box["y"] + 0.5 * box["height"])
    page.get_by_text("epochs trained 3", exact=False).first.wait_for(timeout=5000)
    tooltip = page.locator(".bk-Tooltip").first.evaluate("tip => getComputedStyle(tip).backgroundColor")
    assert tooltip == page.locator("section").first.evaluate("card => getComputedStyle(card).backgroundColor")


def test_a_cell_of_a_map_says_its_value(opened: Any, pages: dict[str, Path]) -> None:
    page = opened("report")
    chart = page.locator('.charts[aria-label="Clip fraction per step and epoch"] .chart').first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.move(box["x"] + 0.41 * box["width"], box["y"] + 0.5 * box["height"])
    tip = page.get_by_text(re.compile(r"epoch \d+, step")).first
    tip.wait_for(timeout=5000)
    found = re.search(r"epoch (\d+), step (\d+)\s+([\d.]+)", tip.inner_text())
    assert found is not None
    epoch, step, value = found.groups()
    records = read_metrics(pages["report"].with_name("metrics.jsonl"))
    key = f"policy/clip_fraction_step_{step}"
    values = [one[key] for one in records if one["kind"] == "update" and one["epoch"] == int(epoch)]
    assert float(value) == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_samples_over_time_by_the_keyboard(opened: Any) -> None:
    page = opened("report")
    shown = page.locator("[data-label]:visible")
    assert shown.get_attribute("data-label") == "after 6 epochs"
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    assert shown.get_attribute("data-label") == "after 4 epochs" and shown.count() == 1


def test_the_evaluation_names_what_it_is_of_and_stays_where_it_was(opened: Any) -> None:
    page = opened("evaluation")
    assert page.title() == "Evaluation of base, tuned, other"
    assert "images/tuned" in page.locator("table").first.inner_text()
    assert (
        page.locator("h3", has_text="caption_match").count()
        == page.locator("h3", has_text="diversity, pixels").count()
        == 1
    )
    prompt = page.locator(".prompt:visible h3")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    assert prompt.inner_text() == CAPTIONS[2]
    page.get_by_role("button", name="Previous").focus()
    page.keyboard.press(" ")  # presses the button, which goes back, and does not go on
    assert prompt.inner_text() == CAPTIONS[1]
    page.reload()
    assert prompt.inner_text() == CAPTIONS[1]


def test_columns_of_an_evaluation_are_swiped_on_a_phone(opened: Any) -> None:
    columns = opened("evaluation", 390).locator(".prompt:visible .columns")
    widths = columns.evaluate("box => [box.clientWidth, box.scrollWidth, box.firstElementChild.clientWidth]")
    assert widths[1] > 2 * widths[0] and widths[2] > 0.6 * widths[0]


def test_two_questions_are_answered_by_the_keyboard(opened: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page = opened("preference")
    question = page.locator(".question")
    assert question.inner_text() == "Which image follows the text better?"
    page.keyboard.press("ArrowLeft")
    assert question.inner_text() == "Which image looks better?"
    page.keyboard.press("ArrowRight")
    page.locator(".pair:visible [data-vote=right]").click()
    page.keyboard.press("z")
    assert page.locator("dialog[open] img").is_visible()
    page.keyboard.press("ArrowDown")
    assert page.locator("dialog[open]").count() == 0
    page.reload()
    assert page.locator("output").inner_text() == "4 of 16 answers"
    page.keyboard.press("Backspace")
    page.get_by_label("your name").fill("anna")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save votes").click()
    download.value.save_as(tmp_path / "votes.json")
    votes = json.loads((tmp_path / "votes.json").read_text())["votes"]
    assert votes == {"0": {"text": "left", "looks": "right"}, "1": {"text": "right", "looks": "tie"}}
    counted = win_rates(pages["preference"].parent / "preference_key.json", [tmp_path / "votes.json"])
    assert {name: sum(one.voters.values()) for name, one in counted.items()} == {"text": 2, "looks": 2}


def test_images_of_a_pair_are_large_on_a_phone(opened: Any) -> None:
    page = opened("preference", 390)
    image = page.locator(".pair:visible img").first
    assert image.bounding_box()["width"] > 300
    page.locator(".pair:visible [data-zoom]").first.tap()
    assert page.locator("dialog[open] img").bounding_box()["width"] > 360
    page.locator("dialog[open] img").tap()
    assert page.locator("dialog[open]").count() == 0
