# Everything a developer runs. TORCH and TRITON are the pair that this commit is tested with.
# FLUXKERN_BUILD is what `build` compiles: cpu, cuda (and cpu), cuda-alone, auto or none.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
FLUXKERN_BUILD ?= cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SETUP := $(BIN)/python setup.py --quiet

.PHONY: install build build-cuda build-emulator wheel demo test test-build sanitize bench gpu-check check clean

install: $(VENV)/.installed build

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) $(TRITON) 'setuptools>=77' wheel
	FLUXKERN_BUILD=$(FLUXKERN_BUILD) $(PIP) install --no-build-isolation --editable '.[dev]'
	touch $@

build: $(VENV)/.installed
	FLUXKERN_BUILD=$(FLUXKERN_BUILD) $(SETUP) build_ext --inplace

build-cuda: $(VENV)/.installed
	FLUXKERN_BUILD=cuda $(SETUP) build_ext --inplace

build-emulator: $(VENV)/.installed
	$(SETUP) build_emulator

wheel: $(VENV)/.installed
	FLUXKERN_BUILD=$(FLUXKERN_BUILD) $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

demo: build
	$(BIN)/fluxkern generate "a red circle on a blue background" --seed 0 --output demo.png --force

test: build build-emulator
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-build: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m build tests/test_build.py tests/test_older_torch.py \
		tests/test_cuda_budgets.py tests/test_budgets.py tests/test_using_the_kernels.py

sanitize: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m sanitize tests/test_sanitizers.py tests/test_cuda_attention.py \
		tests/test_cuda_wgmma.py tests/test_guard_pages.py tests/test_files.py \
		tests/test_fuzz_files.py

# all suites into benchmarks/results/<machine>; SUITE="ops blocks" takes some
bench: build
	$(BIN)/fluxkern bench $(if $(SUITE),--suite $(SUITE))

# needs no virtual environment: python3 with torch, on a machine with a GPU; see its file's head
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(OUT),--out $(OUT)) $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(SITE),--site $(SITE)) $(if $(RESUME),--resume $(RESUME)) $(if $(DRY_RUN),--dry-run)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info demo.png fluxkern/_C_*.so fluxkern/_build_info.json
