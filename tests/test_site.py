"""The site: it builds without a warning, no link in it leads nowhere, and it can be read on every screen."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import filelock
import pytest

pytest.importorskip("material", reason="the site needs signstep[docs]")

ROOT = Path(__file__).parents[1]
PUBLIC = [f"signstep.{name}" for name in ("optim", "distributed", "monitor", "monitor.sinks", "integrations.timm")]
PUBLIC += [f"signstep.theory.{name}" for name in ("bounds", "noise", "problems", "stationarity", "vote")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all workers of a test run."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with filelock.FileLock(shared / "site.lock"):
        if not (shared / "site").exists():
            build(shared / "site-being-built")
            (shared / "site-being-built").rename(shared / "site")
    return shared / "site"


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr


class _Page(HTMLParser):
    """What a page links, what it loads, and what in it can be linked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.names: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        loads = tag in ("script", "img", "source") or (tag == "link" and given.get("rel") in ("stylesheet", "icon"))
        found = {given[name] for name in ("href", "src") if name in given}
        if loads:
            self.loads |= found
        elif tag != "link":
            self.links |= found


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_no_link_leads_nowhere(site: Path, pages: dict[Path, _Page]) -> None:
    assert len(pages) > 20
    lost = []
    for path, page in pages.items():
        for link in page.links | page.loads:
            target, _, fragment = unquote(link).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = (path.parent / target).resolve() if target else path
            if file.is_dir():
                file /= "index.html"
            known = pages[file].names if file in pages else set()
            if not file.is_file() or (fragment and file in pages and fragment not in known | {"__top"}):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == []


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[Path, _Page]) -> None:
    foreign = {
        path.name: page.loads for path, page in pages.items() if any(re.match(r"https?:|//", url) for url in page.loads)
    }
    assert foreign == {}


def test_a_report_is_the_file_of_results_as_it_is(site: Path) -> None:
    reports = [path.relative_to(site) for path in (site / "results").rglob("*.html")]
    assert len(reports) > 3
    assert [name for name in reports if (site / name).read_bytes() != (ROOT / name).read_bytes()] == []


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = set().union(*(_Page(path).names for path in (site / "reference").glob("*.html")))
    names = {f"{module}.{name}" for module in PUBLIC for name in import_module(module).__all__}
    assert names - reference == set()


def test_every_page_of_the_docs_is_on_the_site(site: Path) -> None:
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert [source for source in sources if not (site / source.with_suffix(".html")).is_file()] == []


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def show(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})


@pytest.mark.slow
def test_the_site_in_a_browser(browser: Any, address: str) -> None:
    """Each page is loaded and its equations set once: on a narrow dark screen, which then becomes a wide light one, or
    the other way around.
    """
    narrow, wide = (390, "dark"), (1280, "light")
    context = browser.new_context()
    context.set_default_timeout(120_000)
    problems: list[str] = []
    pages = ("index.html", "theory.html", "reference/optim.html", "reference/theory.html", "results.html")
    for name, screens in zip(pages, cycle([(narrow, wide), (wide, narrow)]), strict=False):
        page = context.new_page()
        show(page, *screens[0])
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: problems.extend([asked.url] if not asked.url.startswith(address) else []))
        page.goto(address + name)
        page.wait_for_function("!document.querySelector('.arithmatex') || document.querySelector('mjx-container')")
        page.evaluate("MathJax.startup.promise.then(() => null)")
        for width, scheme in screens:
            show(page, width, scheme)
            page.wait_for_function(f"innerWidth === {width} && document.documentElement.scrollWidth <= {width}")
            assert page.evaluate(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        assert page.locator("mjx-merror").count() == 0, name
        equations = page.locator(".arithmatex").count()
        assert page.locator(".arithmatex > mjx-container").count() == equations
        assert equations > 10 or "theory" not in name
        page.close()
    context.close()
    assert problems == []
