PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
# Each worker runs torch on one thread (tests/conftest.py). A further one would import everything once more.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 4))')
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

OLDEST_TESTS := package cli folder data_sources data_formats data_corpus vocabulary session serve \
	hf_cache hf_configuration hf_generation hf_modeling hf_padding hf_tokenization hf_training

# Were it set, every process that tests start would compile Python's sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: try demo test test-oldest coverage torture model site wasm dist clean

# Write with the model that is in the repository.
try: $(VENV)/installed
	$(BIN)/mhesa generate models/python --prompt 'def ' --length 400 --seed 1

# Train on the Python standard library's own source text for two minutes, then write with the model.
demo: $(VENV)/installed
	$(BIN)/mhesa train --out runs/demo --minutes 2 --overwrite
	$(BIN)/mhesa generate runs/demo --prompt 'def ' --length 400 --seed 1

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint deploy/Dockerfile
	@# Types are checked while the tests run: mypy keeps one core busy for most of a minute.
	$(BIN)/mypy > $(VENV)/mypy.log & types=$$!; trap "kill $$types" INT TERM; \
	$(BIN)/python $(PYTEST) $(PYTEST_OPTIONS); tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.log; exit $$((tests | types))

# The tests in which other packages do most, with the oldest versions that pyproject.toml allows. It takes
# 4 minutes or less, so that every change can run it.
# numba keeps the kernels of one version beside the source; those of this one go elsewhere.
test-oldest: $(OLDEST)/installed
	NUMBA_CACHE_DIR=$(CURDIR)/$(OLDEST)/numba $(OLDEST)/bin/python $(PYTEST) \
		$(patsubst %,tests/test_%.py,$(OLDEST_TESTS))

# The suite with coverage measured, in the processes it starts as well.
coverage: $(VENV)/installed-dev
	$(BIN)/python $(PYTEST) --cov --cov-report=term --cov-report=xml

# What takes too long for every change: runs killed at every moment. The result goes into the repository.
torture: $(VENV)/installed-dev
	cp benchmarks/torture.head.md benchmarks/torture.md
	TORTURE_REPORT=$(CURDIR)/benchmarks/torture.md $(BIN)/python -m pytest -m torture tests

# The model in models/python: about an hour on two cores.
model: $(VENV)/installed
	$(BIN)/mhesa train --out runs/python --steps 10000 --seed 1 --overwrite
	$(BIN)/python -c 'import mhesa, torch; model, tokenizer = mhesa.load("runs/python"); \
		mhesa.save(model.to(torch.bfloat16), tokenizer, "models/python")'

# The documentation as a site of static files, in site/.
site: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict --quiet

# The model's step for browsers, with Debian's clang-19 and lld-19. The build id is the source's SHA-256: a test
# compares the two.
wasm:
	clang-19 --target=wasm32 -ffreestanding -nostdlib -O3 -Wall -Wextra -Werror -msimd128 -mbulk-memory \
		-mnontrapping-fptoint -fassociative-math -fno-signed-zeros -fno-trapping-math \
		-Wl,--no-entry -Wl,--strip-all -Wl,--build-id=0x$$(sha256sum mhesa/export/step.c | cut -c1-64) \
		-o mhesa/export/step.wasm mhesa/export/step.c
	chmod -x mhesa/export/step.wasm

# The wheel and the source distribution, checked, and the wheel tried in an environment of its own.
dist:
	rm -rf build dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python $(PIP) build twine
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	rm -rf .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python $(PIP) -c constraints.txt $$(grep '^torch==' constraints.txt)
	.venv-dist/bin/python $(PIP) -c constraints.txt dist/*.whl
	cd / && $(CURDIR)/.venv-dist/bin/mhesa --version
	cd / && $(CURDIR)/.venv-dist/bin/mhesa generate $(CURDIR)/models/python --prompt 'def ' --length 100

clean:
	rm -rf $(VENV) $(OLDEST) .venv-dist build dist site runs/demo

# torch goes first, by its exact version: asked for by a range, as the package does, pip may bring the
# newest build and gigabytes of CUDA with it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python $(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt $$(grep '^torch==' constraints-oldest.txt)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e '.[test]'
	touch $@
