# Every command does its own set-up: a virtual environment in $(VENV), the versions of constraints.txt, this package editable.
# Needed beforehand: make, and Python 3.10 or newer. What can be set: make test VENV=/path PYTHON=python3.12 PIP_ARGS=-vv

VENV ?= .venv
PYTHON ?= $$(for p in python3.11 python3.12 python3.13 python3 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo "$$p" && break; done)
# Extra arguments of every pip install, for instance -vv (pip is kept quiet otherwise).
PIP_ARGS ?=
# An index to look for torch in, for instance the one that pytorch.org names for CPU-only builds.
TORCH_INDEX ?=
# Extra arguments of pytest, for instance ARGS="-k merge -x".
ARGS ?=
# Test processes. The tensors are small, so one thread each is fastest.
JOBS ?= 2

PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check --no-input install --quiet --quiet $(PIP_ARGS) --constraint constraints.txt
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest
STAMP = $(VENV)/.ready

.PHONY: help setup demo test slow gpu planted oldest newest lint format tables site freeze clean

help: ## this list
	@echo "lora-lite: make COMMAND"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

setup: $(STAMP) ## virtual environment and packages (the other commands do this themselves)

demo: $(STAMP) ## the demo
	@$(VENV)/bin/lora-lite demo

test: $(STAMP) ## the quick tests, a few minutes
	@$(PYTEST) -n $(JOBS) -m "not slow and not gpu" $(ARGS)

slow: $(STAMP) ## the slow tests
	@$(PYTEST) -m "slow and not gpu" $(ARGS)

gpu: $(STAMP) ## the tests that need a CUDA device
	@$(PYTEST) -m gpu $(ARGS)

planted: $(STAMP) ## plant known bugs and see that the tests notice: minutes; ARGS="--only merge" for some
	@$(PY) scripts/planted_bugs.py --jobs $(JOBS) $(ARGS)

oldest: ## the quick tests on the oldest torch that is promised, in .venv-oldest; several gigabytes
	@TORCH_INDEX="$(TORCH_INDEX)" scripts/oldest.sh -n $(JOBS) $(ARGS)

newest: ## the quick tests on the newest versions of everything, in .venv-newest; several gigabytes
	@TORCH_INDEX="$(TORCH_INDEX)" scripts/newest.sh -n $(JOBS) $(ARGS)

lint: $(STAMP) ## style and types, changes nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)

format: $(STAMP) ## rewrite the source in the project's style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

tables: $(STAMP) ## write generated documents again: methods, API, what works where, formats, costs, architectures, promises, CONTRIBUTING
	@for script in readme_tables rooms_table api_reference methods_page what_works_where cost_tables large_tables architectures_page promises_page formats_page; do \
		echo "scripts/$$script.py"; OMP_NUM_THREADS=1 $(PY) scripts/$$script.py || exit 1; done

site: $(STAMP) ## the documentation site, into build/site
	@$(PIP) 'mkdocs-material>=9.5'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

freeze: $(STAMP) ## the installed versions, in the form of constraints.txt
	@$(PY) -m pip list --format=freeze --exclude-editable | sed 's/+.*//'

clean: ## remove the virtual environment and caches
	[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; [ -n "$$python" ] || { echo "lora-lite needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }; \
	echo "[1/3] virtual environment in $(VENV): $$($$python --version)"; \
	$(PY) -m pip --version >/dev/null 2>&1 || $$python -m venv $(VENV) || \
		{ echo "could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "[2/3] torch, the large download: a minute or more"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$$(grep '^torch==' constraints.txt)"
	@echo "[3/3] lora-lite, with everything its demo and tests use"
	@$(PIP) --editable '.[serve,quant,dev]'
	@touch $@
	@echo "ready"
