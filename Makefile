# VENV: the virtual environment to use; made and filled when its stamp is missing or out of date.
# PYTHON: the interpreter that makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Two stamps: the demo needs a tenth of what the tests do.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
DEMO_INSTALLED := $(VENV)/.tumorsynth-demo
INSTALLED := $(VENV)/.tumorsynth-installed

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
# Models, generators and the paths that a processor's instructions decide on.
AVX2_TESTS = $(foreach name,unet codebook diffusion discriminators generator difftumor weights \
	detail contrast compiled parity slabs kernels speed_paths training_autoencoder \
	training_denoiser,$(shell find tests -name test_$(name).py))

.PHONY: demo test test-avx2 matrix nnunet lint format wheel clean

demo: $(DEMO_INSTALLED)
	$(BIN)/tumorsynth demo

# ONLY=placement: the tests in tests/placement, else in tests/test_*placement*.py, else `-k placement`,
# without the linters.
TESTS = $(firstword $(wildcard tests/$(ONLY:tests/%=%)) $(if $(wildcard tests/test_*$(ONLY)*.py),files))
SELECTED = $(if $(ONLY),$(if $(TESTS),$(TESTS:files=tests/test_*$(ONLY)*.py),-k "$(ONLY)"))

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

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

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
