# Two commands: `make demo` (the main job on real images) and `make test`.
# Each creates .venv, installs what it needs with the versions pinned in constraints.txt, and runs.
PYTHON ?= python3
# The index of PyTorch's CPU (or another CUDA) wheels; empty: whatever your package index gives.
TORCH_INDEX ?=
OUT ?= runs/demo

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test check format clean

demo: .venv/core
	$(BIN)/revelio demo --out $(OUT) --resume

test: .venv/dev
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/core: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing Revelio into .venv (about two minutes, 1.6 GB with a CPU torch) ..."
	$(INSTALL) -e .
	@touch $@

.venv/dev: .venv/core
	$(INSTALL) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv runs build dist
