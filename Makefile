# Two commands matter: `make demo` (see the library work) and `make test` (prove that it does).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install demo test release-check coverage lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP): setup.py pyproject.toml constraints.txt
	@echo "==> Installing meru_fast into $(VENV) (torch with CUDA libraries: about 8 GB, some minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) is too old, Python 3.10 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@
	@echo "==> Installed"

install: $(STAMP)  ## build .venv and install meru_fast with every extra

demo: $(STAMP)  ## make data, train, evaluate, write demo_output/report.html (10 minutes on two cores)
	@$(BIN)/meru-fast demo --output-dir demo_output

test: $(STAMP)  ## run the whole test suite
	@echo "==> Lint and types"
	@$(MAKE) --no-print-directory lint
	@echo "==> Tests"
	@$(BIN)/python -m pytest -n 2 --dist loadfile

release-check: $(STAMP)  ## wheel and source archive in clean environments, with the lowest and the highest torch
	@.ci/release_check

coverage: $(STAMP)  ## run the test suite under coverage and print the table of the README's figure
	@$(BIN)/python -m pytest -n 2 --dist loadfile --cov

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache
