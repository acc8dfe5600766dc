# Two commands on a machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean help

help:            ## Show the targets.
	@grep -E '^[a-z]+: .*##|^[a-z]+:  +##' Makefile | sed -E 's/:.*##/:/'

demo: $(VENV)/.installed  ## Install and run the demo: nine miniature corpora to four builds, in ./demo.
	$(VENV)/bin/longllava demo --out demo

test: $(VENV)/.installed-dev  ## Install with the training extra and run the whole test suite.
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev  ## Check style, types and the direction of imports.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:           ## Remove what the targets above made.
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[train,dev]'
	touch $@ $(VENV)/.installed
