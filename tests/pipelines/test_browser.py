"""report.html in a real browser: nothing goes wrong in it, and what it offers works."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines.opened import OpenBuild
from pipelines.page import REPORT, report_page

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2><svg onload=window.hacked=3>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine; `apt-get install chromium` to test the report in a browser")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed; `pip install .[peers]` to test the report in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def build(demo: Path) -> Path:
    return demo / "builds/multi_image"


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; whatever the browser complains of, or asks of a network, fails the test at its end."""
    complaints: list[str] = []
    contexts = []

    def open_page(file: Path, *, drawn: bool = True, **settings: Any) -> Any:
        contexts.append(chromium.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        page.goto(file.as_uri())
        if drawn:
            page.wait_for_selector("html[data-drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page: Any, kind: str) -> int:
    return int(page.locator(f'[data-item="{kind}"]:visible').count())


def test_all_plots_are_drawn_without_network_or_eval(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT)
    assert page.locator(".vega svg").count() == 7
    assert page.locator('.vega svg [aria-roledescription="bar"]').count() > 20
    assert page.locator("img").evaluate_all("images => images.every(i => i.src.startsWith('data:image/jpeg'))")


def test_no_script_but_the_pages_own_two_can_run(chromium: Any, build: Path) -> None:
    page = chromium.new_page()
    page.goto((build / REPORT).as_uri())
    with pytest.raises(Exception, match="Content Security Policy"):
        page.add_script_tag(content="window.hacked = 1")
    assert page.evaluate("window.hacked") is None
    page.close()


def test_filters_and_search_leave_what_fits_and_say_how_many(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT)
    form = page.locator('form[data-list="sample"]')
    everything = shown(page, "sample")
    form.locator('[data-by="component"]').select_option("videochat2")
    some = shown(page, "sample")
    assert 0 < some < everything
    assert form.locator("output").text_content() == f"{some} of {everything}"
    assert page.locator('[data-item="sample"]:visible:not([data-component="videochat2"])').count() == 0
    form.locator('[data-by="text"]').fill("no such words anywhere")
    assert shown(page, "sample") == 0
    form.locator('[data-by="text"]').fill("TRIANGLE")
    found = page.locator('[data-item="sample"]:visible')
    assert 0 < found.count() <= some
    assert all("triangle" in text.lower() for text in found.all_text_contents())
    rejects = page.locator('form[data-list="reject"]')
    rejects.locator('[data-by="reason"]').select_option("broken-video")
    assert shown(page, "reject") == 2


def test_pictures_are_laid_out_as_the_model_reads_them(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT)
    clip = page.locator(".strip").first
    times = [float(text.split()[0]) for text in clip.locator("figcaption").all_text_contents()]
    assert times == sorted(times)
    assert clip.locator(".tok").count() == len(times) - 1
    grids = page.locator(".grid").evaluate_all(
        """grids => grids.map(grid => [...grid.children].map(tile => {
            const place = tile.alt.match(/row (\\d+), column (\\d+)/).slice(1).map(Number);
            return [...place, tile.offsetTop, tile.offsetLeft];
        }))"""
    )
    assert max(len(grid) for grid in grids) >= 4
    for grid in grids:
        rows = {row: top for row, _, top, _ in grid}
        columns = {column: left for _, column, _, left in grid}
        assert all(rows[row] == top and columns[column] == left for row, column, top, left in grid)
        assert sorted(rows, key=rows.__getitem__) == sorted(rows)
        assert sorted(columns, key=columns.__getitem__) == sorted(columns)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(opened: Callable[..., Any], build: Path, scheme: str) -> None:
    page = opened(build / REPORT, color_scheme=scheme)
    contrast = """selector => {
        const light = colour => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const element = document.querySelector(selector);
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    for selector in ("body", "small", ".tok", ".answer .said", ".role span", "a[href='#plots']", ".warn", "td"):
        assert page.evaluate(contrast, selector) >= 4.5, selector
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click(click_count=2 if scheme == "light" else 1)
    page.wait_for_function("before => getComputedStyle(document.body).backgroundColor !== before", arg=before)


def test_a_phone_needs_no_sideways_scrolling(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT, viewport={"width": 360, "height": 740}, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_rejected_pictures_are_seen_and_found_by_reason(opened: Callable[..., Any], demo: Path) -> None:
    page = opened(demo / "builds/single_image" / REPORT)
    thumbnails = page.locator("#rejects img")
    assert thumbnails.count() == 1
    sides = thumbnails.evaluate("image => (image.loading = 'eager', image.decode().then(() => image.naturalWidth))")
    assert 20 < sides <= 96
    page.locator('form[data-list="reject"] [data-by="reason"]').select_option("media-missing")
    assert shown(page, "reject") == 1
    assert not thumbnails.is_visible()
    page.locator('form[data-list="reject"] [data-by="reason"]').select_option("broken-image")
    assert thumbnails.is_visible()


def test_on_a_phone_rejects_are_cards_and_to_a_screen_reader_a_table(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT, viewport={"width": 390, "height": 740}, is_mobile=True)
    cards = page.locator('[data-item="reject"]')
    boxes = [cards.nth(i).bounding_box() for i in range(cards.count())]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    table = page.get_by_role("table", name="Rejected records")
    assert table.get_by_role("row").count() == 7
    assert table.get_by_role("columnheader").all_text_contents()[:3] == ["picture", "reason", "detail"]
    assert table.get_by_role("rowheader", name="broken-video").count() == 2


def test_a_screen_reader_hears_what_a_plot_is_and_its_bars(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT)
    mix = page.get_by_role("figure", name="Mix Each component's share")
    assert mix.count() == 1
    bars = mix.locator('[role="graphics-symbol"][aria-label*="component: videochat2"]')
    assert bars.count() == 2
    assert bars.evaluate_all("bars => bars.every(bar => !bar.closest('[role=img], [aria-hidden=true]'))")


def test_the_keyboard_reaches_everything_and_everything_has_a_name(opened: Callable[..., Any], build: Path) -> None:
    page = opened(build / REPORT)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("img:not([alt]), input, select, button, [role=region], [role=group]")]
            .filter(e => !(e.alt || e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    scrolling = page.evaluate(
        """() => [...document.querySelectorAll(".scroll, .strip")].filter(e => e.tabIndex !== 0).length"""
    )
    assert scrolling == 0
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.locator('form[data-list="sample"] select').first.focus()
    before = shown(page, "sample")
    page.keyboard.press("m")
    assert 0 < shown(page, "sample") < before


def test_hostile_text_runs_nothing(opened: Callable[..., Any], make_build: Callable[..., Path]) -> None:
    broken = b"\xff\xd8\xff" + HOSTILE.encode()
    out = make_build([(HOSTILE, HOSTILE, None), (HOSTILE, "Yes.", (64, 64)), ("x", "y", broken)], description=HOSTILE)
    page = opened(out / REPORT)
    assert page.evaluate("window.hacked") is None
    assert page.locator("article img:not([src^='data:image/jpeg'])").count() == 0
    assert page.locator("article svg").count() == 0
    assert sum(HOSTILE in text for text in page.locator("article").all_text_contents()) == 2


def test_a_build_of_nothing_opens_too(opened: Callable[..., Any], make_build: Callable[..., Path]) -> None:
    page = opened(make_build([("x", "y", b"no picture")]) / REPORT)
    assert "This build holds no samples" in page.locator("main").text_content()
    assert page.locator("[data-plot]").count() == 1
    assert shown(page, "reject") == 1


def test_several_builds_share_a_page(opened: Callable[..., Any], demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    file.write_bytes(report_page([OpenBuild(demo / "builds" / name) for name in ("text", "multi_image")]))
    assert file.stat().st_size < 5_000_000
    page = opened(file)
    assert page.locator(".vega svg").count() == 11
    page.locator('form[data-list="sample"] [data-by="build"]').select_option("text")
    assert page.locator('[data-item="sample"]:visible:not([data-build="text"])').count() == 0
