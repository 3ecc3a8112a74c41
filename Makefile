PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python -m
PIP := $(RUN) pip install -qq --disable-pip-version-check --no-compile
# pip would compile all there is: Python compiles what is imported, once, and is to keep that whatever the environment says
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help train test tables lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

train: .venv/installed ## install, then python train.py $(ARGS): by default the embedded digits
	.venv/bin/python train.py $(ARGS)

test: lint ## install every extra, lint, then pytest $(ARGS)
	$(RUN) pytest $(ARGS)

tables: .venv/installed ## README's tables of binary images (days), or rows of them: make tables ARGS=mnist_large
	.venv/bin/python benchmarks/tables.py $(or $(ARGS),all)

lint: .venv/installed-dev ## ruff check, ruff format --check and the type checker
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

format: .venv/installed-dev ## let ruff repair and format the code
	$(RUN) ruff check --fix-only
	$(RUN) ruff format

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build dist .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing vlae into .venv: a few minutes, once"
	@$(PIP) --editable '.[plots,compress]'
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing vlae and every extra into .venv: a few minutes, once"
	@$(PIP) --editable '.[dev]'
	@touch .venv/installed $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vlae needs Python 3.11 or newer as $(PYTHON); name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "$(PYTHON) cannot make .venv; its venv module may be a package of its own" >&2; exit 1; }
