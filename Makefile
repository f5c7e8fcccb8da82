# Two commands on a fresh machine: `make demo` and `make test`.  Both make their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed
	$(BIN)/pfungst demo --out pfungst-demo

test: $(VENV)/.compared lint
	$(BIN)/python -m pytest

test-all: $(VENV)/.compared lint
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.compared
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The constraints pin a torch whose CPU build is enough; without them pip may take gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "pfungst needs Python 3.11 or later"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e . -c constraints.txt
	touch $@

# What the tests compare with.  Without dependencies: torchvision's wheel would replace the CPU build of torch.
$(VENV)/.compared: $(VENV)/.installed requirements-compare.txt
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-compare.txt
	touch $@

clean:
	rm -rf $(VENV) pfungst-demo build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
