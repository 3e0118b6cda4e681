# VENV: the virtual environment to use; made and filled when its stamp is missing or out of date.
# PYTHON: the interpreter that makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Two stamps: the demo needs a tenth of what the tests do.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
DEMO_INSTALLED := $(VENV)/.tumorsynth-demo
INSTALLED := $(VENV)/.tumorsynth-installed

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder
# Tests of what a processor's instructions decide on.
AVX2_TESTS := tests/models tests/generators tests/appearance/test_contrast.py \
	tests/training/test_training_autoencoder.py tests/training/test_training_denoiser.py

.PHONY: demo test test-avx2 matrix nnunet lint format wheel release-check clean

demo: $(DEMO_INSTALLED)
	$(BIN)/tumorsynth demo

# ONLY=placement: the tests in tests/placement, else `-k placement`; without the linters.
SELECTED = $(if $(ONLY),$(or $(wildcard tests/$(ONLY:tests/%=%)),-k "$(ONLY)"))

# pytest comes last, so that its summary is the run's last line. A process per core, one thread each:
# many small operations are faster so, and results do not depend on the number of cores.
test: $(if $(ONLY),$(INSTALLED),lint)
	$(PYTEST) $(SELECTED)

# What depends on the processor, as on one with AVX2 alone; elsewhere than on x86 the limit does nothing.
test-avx2: $(INSTALLED)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) $(AVX2_TESTS)

# The tests on the lowest versions that pyproject.toml allows, and each framework's on the versions
# that the docs name; ONLY="monai" takes the rows of a name.
matrix: $(INSTALLED)
	$(BIN)/python tests/matrix.py $(ONLY)

# nnU-Net without its own dependencies, for the tests that skip where it is not installed.
nnunet: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r tests/nnunet.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# What a release needs: sdist and wheel, their contents and metadata checked, the wheel installed into
# an empty environment, and the demo run from there.
release-check: $(INSTALLED)
	rm -rf dist build/release
	$(BIN)/python -m hatchling build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/test_package.py
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[cli]"
	cd build/release && bin/tumorsynth demo -o demo && test -f demo/phantom_report.json

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) ".[cli]"
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) ".[test,all]"
	@touch $(DEMO_INSTALLED) $@
