"""What every test process starts with."""

import gc
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

# Triton reads this when it is first imported, whichever test comes first: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Started in the background of a shell, a test run ignores SIGINT, and so do its children: the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Until all tests are found, where they are looked for: imports leave no garbage to speak of, and looking for it takes a
# fifth of their time.
if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()

# A slow machine is no failure. `make test-long` draws more examples, by --hypothesis-profile.
settings.register_profile("signstep", deadline=None, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=200)
settings.load_profile("signstep")


def pytest_collection_finish() -> None:
    """Modules stay: the garbage collector, which each run of the lab calls once, need not walk through them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        importlib.import_module("torch._dynamo")  # a quarter of all objects; the first optimizer would import it
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _ranks_end_with_their_module() -> Iterator[None]:
    """No module finds the groups of others in its ranks: hundreds of them took half of two cores."""
    yield
    if "gang" in sys.modules:
        sys.modules["gang"].stop_all()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"the browser test needs one of {', '.join(names)} on the PATH")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-sync", *quiet]
        started = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield started
        started.close()
