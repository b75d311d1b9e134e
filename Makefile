PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test torture clean

# Train on the Python standard library's own source text for two minutes, then write with the model.
demo: $(VENV)/installed
	$(BIN)/mhesa train --out runs/demo --minutes 2 --overwrite
	$(BIN)/mhesa generate runs/demo --prompt 'def ' --length 400 --seed 1

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# What takes too long for every change: runs killed at every moment. The result goes into the repository.
torture: $(VENV)/installed-dev
	cp benchmarks/torture.head.md benchmarks/torture.md
	TORTURE_REPORT=$(CURDIR)/benchmarks/torture.md $(BIN)/python -m pytest -m torture tests

clean:
	rm -rf $(VENV) runs/demo

# torch goes first, by its exact version: asked for by a range, as the package does, pip may bring the
# newest build and gigabytes of CUDA with it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[dev]'
	touch $@
