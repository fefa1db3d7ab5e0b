# Everything a developer runs. TORCH and TRITON are the pair that this commit is tested with.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: install demo test check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) $(TRITON) 'setuptools>=77' wheel
	$(PIP) install --no-build-isolation --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/fluxkern generate "a red circle on a blue background" --seed 0 --output demo.png --force

test: install
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info demo.png
