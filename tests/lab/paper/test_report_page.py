"""The report's page in a browser, where there is one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pairwise import every_combination
from signstep.lab.paper.experiments import Experiment


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """Opens the page; at the end there must have been no request but the page itself, and no error."""
    contexts, problems, requests = [], [], []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        return tab

    yield open_page
    assert problems == []
    assert [url for url in requests if url not in (page.as_uri(), "data:,")] == []
    for context in contexts:
        context.close()


# Text that sticks out of the window or its box, or is cut off, or has too little contrast to the page.
_LOOK = """() => {
  const width = document.documentElement.clientWidth;
  const out = [...document.querySelectorAll("main td, main th, main p, h1, h2, figcaption, .key li, svg text")]
    .filter((e) => e.getClientRects().length && !e.closest(".scroll, .hidden, pre, thead"))
    .filter((e) => { const r = e.getBoundingClientRect(); return r.right > width + 1 || r.left < -1; });
  const cells = [...document.querySelectorAll("tr[data-row] td")];
  return {
    overflow: document.documentElement.scrollWidth - width,
    out: out.map((e) => e.textContent.trim()),
    cells: cells.length,
    invisible: cells.filter((c) => { const r = c.getBoundingClientRect(); return r.width < 5 || r.height < 5; }).length,
    background: getComputedStyle(document.body).backgroundColor,
    smallest: Math.min(...[...document.querySelectorAll("svg text")]
      .map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)),
    hints: [...document.querySelectorAll(".scroll")].map((e) => {
      const style = getComputedStyle(e);
      return style.overflowX === "auto" && style.backgroundAttachment === "local, local, scroll, scroll";
    }),
  };
}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "scheme", "width"), every_combination([True, False], ["light", "dark"], [1280, 390])
)
def test_the_page_in_a_browser(opened: Any, table1: Experiment, width: int, scheme: str, script: bool) -> None:
    tab = opened(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script)
    if not script:
        # Without script the page is complete: the same numbers stand in it.
        assert tab.locator("figure.curves .key li").count() == 2 * len(table1.rows)
        assert tab.locator("figure svg").count() == 6
        assert tab.locator("tr[data-row] td").first.is_visible()
        return
    look = tab.evaluate(_LOOK)
    assert look["overflow"] <= 0
    assert look["out"] == []
    assert look["cells"] == 8 * len(table1.rows)
    assert look["invisible"] == 0
    assert look["smallest"] >= 11  # pixels on the screen
    assert look["hints"]
    assert all(look["hints"])
    assert (int(re.findall(r"\d+", look["background"])[0]) > 200) == (scheme == "light")


@pytest.mark.slow
def test_values_under_the_pointer_and_toggling(opened: Any) -> None:
    tab = opened(viewport={"width": 1280, "height": 900})
    figure = tab.locator("figure.curves").first
    value = figure.locator(".key li").first.locator("span").last
    final = value.inner_text()
    svg = figure.locator("svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    assert figure.locator(".when").inner_text().startswith("epoch ")
    assert value.inner_text() != final
    tab.mouse.move(box["x"] - 40, box["y"])
    assert (figure.locator(".when").inner_text(), value.inner_text()) == ("last epoch", final)
    item = figure.locator(".key li[data-method=signsgd]")
    line = figure.locator("svg [data-method=signsgd]").first
    item.focus()
    tab.keyboard.press("Enter")
    assert item.get_attribute("aria-pressed") == "false"
    assert not line.is_visible()
    item.click()
    assert item.get_attribute("aria-pressed") == "true"
    assert line.is_visible()


@pytest.mark.slow
def test_a_row_of_the_table_picks_out_its_curves(opened: Any) -> None:
    tab = opened(viewport={"width": 1280, "height": 900})
    picked = """() => [...document.querySelectorAll("figure svg")].map((svg) => {
      const methods = new Set([...svg.querySelectorAll(".on")].map((e) => e.dataset.method));
      return [svg.classList.contains("focus"), ...methods].join(" ");
    })"""
    nothing = ["false"] * 6
    assert tab.evaluate(picked) == nothing
    tab.locator("tr[data-row=signsgd] td").first.hover()
    assert tab.evaluate(picked) == ["true signsgd"] * 6
    # SGD, which the differences are taken to, is no line of their drawings, which stay as they are.
    tab.locator("tr[data-row=sgd] td").first.hover()
    assert sorted(tab.evaluate(picked)) == ["false"] * 2 + ["true sgd"] * 4
    tab.locator("h1").hover()
    assert tab.evaluate(picked) == nothing
    tab.locator("tr[data-row=sgd]").focus()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.dataset.row") == "adam"
    assert tab.evaluate(picked) == ["true adam"] * 6
    tab.keyboard.press("Tab")
    tab.evaluate("document.activeElement.blur()")
    assert tab.evaluate(picked) == nothing


def test_print_is_dark_on_light_whatever_the_scheme(opened: Any) -> None:
    tab = opened(viewport={"width": 680, "height": 900}, color_scheme="dark")
    tab.emulate_media(media="print")
    look = tab.evaluate(_LOOK)
    assert look["overflow"] <= 0
    assert look["out"] == []
    assert int(re.findall(r"\d+", look["background"])[0]) > 200
    ink = tab.evaluate("getComputedStyle(document.body).color")
    assert int(re.findall(r"\d+", ink)[0]) < 60
