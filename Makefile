# The front door: `make help`. Everything runs in .venv, made on first use with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-long lint docs dist bench browser clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## the environment in .venv

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/signstep/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# In a folder of its own, for tests/integrations/test_timm.py alone: beside a torch for CPUs no trainer must find torchvision.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
	    --target $(VENV)/timm timm torchvision || echo "no timm here: its tests will be skipped"
	touch $@

demo: $(STAMP) ## train sign steps, their peers and the remedies on real images, say what to take from it (minutes)
	$(BIN)/signstep demo

PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses 2 --dist worksteal

test: $(STAMP) browser ## the tests, lint among them (ten minutes on two cores)
	$(PYTEST) --durations 30 -m 'not long'

test-fast: $(STAMP) ## while you work: all but the tests that are marked slow or long (two minutes)
	$(PYTEST) -m 'not long and not slow'

test-long: $(STAMP) ## what `make test` leaves out: the same laws at greater length, before an issue is closed
	$(PYTEST) --durations 30 -m long --hypothesis-profile long
	$(PYTEST) --durations 30 -m 'hypothesis and not long' --hypothesis-profile long

lint: $(STAMP) docs ## ruff, mypy --strict, which file may import which, and the site (make test runs this too)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(STAMP) ## the site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dist: $(STAMP) ## what is published, in dist: built, checked, and tried in fresh environments without a compiler
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python release/dist.py

bench: $(STAMP) ## what a step costs beside other optimizers and the speed of memory (minutes)
	$(BIN)/signstep bench step --out results/bench

# The report's tests drive a Chromium; where there is none and apt can install one, it does, else they say that they skip.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	    command -v $$name >/dev/null && exit 0; done; \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && echo "installing Debian's chromium for the report's tests" \
	       && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	  || echo "no Chromium here: the report's browser tests will be skipped"

clean: ## remove the environment and caches, not results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
