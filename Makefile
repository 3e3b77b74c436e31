# Every target sets up what it needs, in a virtual environment of its own.
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check bench docs clean test-gpu bench-gpu

demo: $(VENV)/.demo
	$(BIN)/cassetta demo

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench -o python_files='bench_*.py' --benchmark-group-by=group \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-max-time=0.4
	$(BIN)/python -m cassetta bench --budget $(BUDGET)

# On a GPU, with the packages that PYTHON has, or that lie in a folder named by PYTHONPATH, offline:
# both stop after BUDGET seconds, as does the second half of `bench`, and go on where they stopped when
# they are run again.
BUDGET ?= 400
GPU_TESTS = tests/test_gpu.py tests/test_golden.py tests/test_convolutions.py tests/test_boxes.py \
	tests/test_passes.py tests/test_pool.py tests/test_resize.py tests/test_joined.py \
	tests/test_exchanged.py tests/test_fused.py

# what breaks first where torch, triton or Python is another: compilation, export, choice, networks
CORNER_TESTS = tests/test_torch.py tests/test_dispatch.py tests/test_golden.py tests/test_unet.py \
	tests/test_updown.py tests/test_resize.py::test_it_compiles_without_a_break

test-gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m pytest $(GPU_TESTS) --budget $(BUDGET) --resume -o filterwarnings=default

bench-gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m cassetta bench --budget $(BUDGET)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

# a stamp per extra: installed again when pyproject.toml changes
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "cassetta needs Python 3.10 or newer; make PYTHON=python3.12 chooses one"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
