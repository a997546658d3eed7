# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: a virtual environment in .venv, made once and renewed when
# pyproject.toml changes. Needs only make and a Python >= 3.11.

SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
WORKDIR := runs/crossvit-digits
EXTRAS ?= test
comma := ,
STAMP := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))
PYTEST_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint format parity claims clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## create .venv and install attnjax (choose a Python with PYTHON=..., extras with EXTRAS=test,cuda)

train: $(STAMP) ## train CrossViT on the bundled digits: a few minutes on two CPU cores
	@$(PY) -m launch.train --config=configs/crossvit/digits.py --workdir=$(WORKDIR)
	@echo "report: $(WORKDIR)/report/report.md    again from zero: rm -r $(WORKDIR)"

test: $(STAMP) ## run the default tests (PYTEST_ARGS="-k attention -x" to choose)
	@$(PY) -m pytest -q -n 2 --dist=worksteal $(PYTEST_ARGS)

test-slow: $(STAMP) ## run the tests that take minutes each
	@XLA_FLAGS= $(PY) -m pytest -q -m slow $(PYTEST_ARGS)

lint: $(STAMP) ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet . || { echo "run 'make format'"; exit 1; }

format: $(STAMP) ## apply formatting
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

parity: $(STAMP) ## compare with the reference implementations (installs PyTorch for the CPU and timm)
	@$(PY) -m pip install --quiet -e '.[test,parity]'
	@$(PY) -m pytest -q -m 'slow or not slow' tests/parity $(PYTEST_ARGS)

claims: $(STAMP) ## measure CrossViT's claim against its baseline (appends to configs/results.jsonl)
	@$(PY) -m launch.claims --system=crossvit

clean: ## remove .venv and caches; runs stay
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate counts only when it starts (a pyenv shim may not), is new enough and can build a venv.
$(STAMP): pyproject.toml
	@set -e; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV); found=; unable=; \
	  for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	    unable="$$unable $$candidate"; \
	  done; \
	  if [ -z "$$found" ] && [ -n "$$unable" ]; then \
	    echo "make: found$$unable, but without the venv and ensurepip modules; install them (Debian, Ubuntu: apt install python3-venv) or name another one: make PYTHON=/path/to/python" >&2; exit 1; \
	  elif [ -z "$$found" ]; then \
	    echo "make: no working Python >= 3.11 found; name one: make PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  echo "setting up $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV); \
	fi; \
	echo "installing attnjax[$(EXTRAS)]: a minute or two, once"; \
	$(PY) -m pip install --quiet -e '.[$(EXTRAS)]'; \
	touch $@
