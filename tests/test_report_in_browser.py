"""Report and viewer in a browser: Debian's Chromium, without a window.

Without `chromium` (`.ci/run` installs it) these are skipped. Pictures are kept in `build/screenshots/`, for people.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

from common.place import Place
from learner.benchmarks.drawn_run import draw_run
from learner.report.completions import recorded_group
from learner.report.page import report_page, view_page
from learner.report.run_data import RunData

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PICTURES = Path(__file__).parents[1] / "build/screenshots"
LOCAL = ("file:", "data:")
PHONE, DESK = {"width": 360, "height": 780}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one run, of several, a viewer, and a run whose texts are hostile."""
    root = tmp_path_factory.mktemp("pages")
    runs = [draw_run(root, f"seed{seed}", steps=20, per_step=20, seed=seed) for seed in (0, 1)]
    runs.append(draw_run(root, "other", steps=20, per_step=20, replay__max_staleness=5))
    data = [RunData.read(str(run)) for run in runs]
    namesakes = [draw_run(root / f"root{seed}", "first", steps=4, per_step=20, seed=seed) for seed in (0, 1)]
    (runs[0] / "quarantine.json").write_text(json.dumps([{"group": 3, "reason": "<b>reward</b> raised"}]))
    pages = {
        "report": report_page(data[:1]),
        "comparison": report_page(data),
        "namesakes": report_page([RunData.read(str(run)) for run in namesakes]),
        "view": view_page(recorded_group(data[0], 0)),
        "hostile": view_page(_hostile(recorded_group(data[0], 0))),
    }
    return {name: _written(root / f"{name}.html", text) for name, text in pages.items()}


def _hostile(group: dict[str, Any]) -> dict[str, Any]:
    bad = "</script><img src=x onerror='window.hit=1'>"
    group["prompt"] = bad
    group["side"] = 0
    for completion in group["completions"]:
        completion["tokens"] = [bad, "a\n", " ", "", *completion["tokens"][4:]]
        completion["components"] = {bad: 1.0}
    return group


def _written(path: Path, text: str) -> Path:
    Place(path.parent).write(path.name, text.encode())
    return path


@pytest.fixture
def opened(browser: Any, files: dict[str, Path]) -> Iterator[Any]:
    """Opens a page by its name; at the end nothing may have gone wrong in it."""
    told: list[str] = []
    pages = []

    def open_page(name: str, *, size: dict[str, int] = DESK, scheme: str = "light") -> Page:
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.extend([] if request.url.startswith(LOCAL) else [request.url]))
        page.goto(files[name].as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert told == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison", "view"])
def test_nobody_is_shut_out(name: str, scheme: str, opened: Any) -> None:
    page = opened(name, scheme=scheme)
    page.screenshot(path=PICTURES / f"{name}-{scheme}.png", full_page=True)
    found = Axe().run(page).response["violations"]
    serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert serious == []


@pytest.mark.parametrize("name", ["report", "comparison", "view", "hostile"])
def test_a_phone_needs_no_scrolling_sideways(name: str, opened: Any) -> None:
    page = opened(name, size=PHONE)
    page.screenshot(path=PICTURES / f"{name}-phone.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    texts = "[...document.querySelectorAll('figure svg text')].map((one) => one.getBoundingClientRect().height)"
    assert all(height >= 8 for height in page.evaluate(texts)), "the words of the plots can be read"


def group_in(page: Page) -> dict[str, Any]:
    return json.loads(page.inner_text("#groups") or page.evaluate("document.getElementById('groups').textContent"))[0]


def masked(page: Page, completion: int) -> list[bool]:
    """Which tokens of a completion are still masked, in their order."""
    card = page.locator(".completion").nth(completion)
    return [("masked" in (one.get_attribute("class") or "")) for one in card.locator("button.tok").all()]


def test_the_slider_reveals_tokens_in_the_order_of_the_record(opened: Any) -> None:
    page = opened("view")
    group = group_in(page)
    slider = page.locator("input[type=range]")
    assert slider.get_attribute("max") == str(max(one["nfe"] for one in group["completions"]))
    for step in range(int(slider.get_attribute("max") or 0) + 1):
        slider.fill(str(step))
        for number, one in enumerate(group["completions"]):
            drawn = [
                reveal > step if version >= 0 else step < one["nfe"]
                for reveal, version in zip(one["reveal"], one["version"], strict=True)
            ]
            assert masked(page, number) == drawn, (step, number)
    cells = page.locator(".completion").first.locator(".grid button.tok").all_inner_texts()
    assert "".join(cells) == "".join(group["completions"][0]["tokens"][:16]), "a sudoku is drawn as one"


def test_the_keyboard_is_enough(opened: Any) -> None:
    page = opened("view")
    slider = page.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.input_value() == "0"
    assert all(masked(page, 0))
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == f"denoising step 1 of {slider.get_attribute('max')}"
    page.keyboard.press("End")
    tokens = page.locator(".completion").first.locator("button.tok")
    tokens.first.focus()
    told = page.locator(".completion").first.locator(".told")
    for key, position in (("ArrowRight", 2), ("ArrowDown", 6), ("End", 17), ("Home", 1), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert f"position {position}" in told.inner_text().replace(",", " ").replace(":", " ") + " "
    one = group_in(page)["completions"][0]
    assert f"revealed in step {one['reveal'][0]} of {one['nfe']}" in told.inner_text()
    weight = float(f"{one['weight'][0]:.3g}")
    assert f"importance weight {weight:g}" in told.inner_text()
    assert tokens.first.get_attribute("title") == told.inner_text(), "the pointer's tooltip says the same"


def test_play_goes_to_the_end_and_can_be_paused(opened: Any) -> None:
    page = opened("view")
    play, slider = page.locator("button.play"), page.locator("input[type=range]")
    play.click()
    assert slider.input_value() == "0"
    expect(slider).to_have_value("2")
    play.click()
    there = slider.input_value()
    page.wait_for_timeout(700)
    assert (slider.input_value(), play.inner_text()) == (there, "▶ Play")
    play.click()
    expect(slider).to_have_value(slider.get_attribute("max") or "", timeout=20_000)
    assert play.inner_text() == "▶ Play"


def test_colours_can_be_those_of_other_things(opened: Any) -> None:
    page = opened("view")
    token = page.locator(".completion").first.locator("button.tok").first
    seen = set()
    for kind in ("reveal", "logprob", "entropy", "weight"):
        page.locator("[data-part=colour]").select_option(kind)
        seen.add((token.evaluate("(one) => one.style.getPropertyValue('--hue')"), page.inner_text("[data-part=high]")))
    assert len(seen) == 4


def test_a_group_of_the_table_is_shown_by_its_link(opened: Any) -> None:
    page = opened("report")
    link = page.locator("a[data-at]").last
    link.click()
    assert page.inner_text("[data-part=about]").startswith(f"Group {link.inner_text()} ")


def test_a_link_opens_the_group_of_its_own_run(opened: Any) -> None:
    page = opened("namesakes")
    for number in (1, 2):
        link = page.locator(f"#completions-{number} + p + div a[data-at]").first
        link.click()
        chosen = page.locator("[data-part=group] option:checked").inner_text()
        assert re.match(rf"group {link.inner_text()} · step \d+ · first \({number}\) · best", chosen), chosen


def test_what_a_completion_says_is_never_run(opened: Any) -> None:
    page = opened("hostile")
    token = page.locator(".completion").first.locator("button.tok").first
    token.hover()
    page.locator("details").first.click()
    assert "onerror" in page.locator(".told").first.inner_text()
    assert page.evaluate("window.hit === undefined && document.images.length === 0")
