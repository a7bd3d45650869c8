# Everything a newcomer needs: `make demo`, `make test`. Nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo pixels test test-slow test-browser test-ray check docs clean
venv: $(STAMP)

# A pinned torch comes as a CPU build; an unpinned one may pull several GB of CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

OUT ?= quickstart
demo: $(STAMP)
	$(BIN)/lorasmith quickstart --out $(OUT)

# half an hour on two cores; run again, it goes on where it stopped
pixels: $(STAMP)
	$(BIN)/python -m lorasmith.recipes.pixels --out pixels

test: $(STAMP)
	$(BIN)/pytest -m "not slow and not browser" tests

test-slow: $(STAMP)
	$(BIN)/pytest -m slow tests

# The playground in headless Chromium, Debian's: a browser from elsewhere may be out of reach.
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
BROWSER_STAMP := $(VENV)/.browser-installed
$(BROWSER_STAMP): $(STAMP)
	command -v chromium || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,browser]"
	touch $@

test-browser: $(BROWSER_STAMP)
	$(BIN)/pytest -m "browser" tests/browser

# Ray in an environment of its own: it brings uvloop, and the others are tested as users have them.
RAY_VENV := .venv-ray
RAY_STAMP := $(RAY_VENV)/.installed
$(RAY_STAMP): pyproject.toml constraints.txt
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,ray]"
	touch $@

test-ray: $(RAY_STAMP)
	$(RAY_VENV)/bin/pytest -m "ray" tests/on_ray

check: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site; it asks no other site for anything. Any warning stops the build.
DOCS_STAMP := $(VENV)/.docs-installed
$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

docs: $(DOCS_STAMP)
	PYTHONPATH=src NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(RAY_VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
