# Every target sets up what it needs, in a virtual environment of its own.
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check bench bench-host docs clean test-gpu bench-gpu test-simulated test-versions

demo: $(VENV)/.demo
	$(BIN)/cassetta demo

# in as many processes as there are cores, a file in each at a time
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# What breaks first where torch, triton or Python is another: compilation, export, choice, networks.
VERSION_TESTS = tests/test_torch.py tests/test_cuda_machine.py tests/test_machine.py \
	tests/test_dispatch.py tests/test_golden.py tests/test_unet.py tests/test_updown.py \
	tests/test_ops.py::test_inductor_finds_results_where_it_was_told \
	tests/test_resize.py::test_it_compiles_without_a_break \
	tests/test_fused.py::test_compile_export_checkpoint

test-versions: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(VERSION_TESTS) -k 'not through_the_kernels'

# Compiled kernels, whose PTX is simulated on the CPU (tests/ptxsim); `make -j2` runs both targets at
# once, `make simulate-90` one of them. CI runs the first four of these.
SIMULATED = tests/ptxsim tests/test_simulated.py tests/test_pairwise.py tests/test_march.py \
	tests/test_boxes.py tests/test_convolutions.py tests/test_passes.py tests/test_pool.py tests/test_resize.py \
	tests/test_joined.py tests/test_exchanged.py tests/test_fused.py

test-simulated: simulate-80 simulate-90

simulate-%: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIMULATED) --simulate $* --resume

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench -o python_files='bench_*.py' --benchmark-group-by=group \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-max-time=0.4
	$(BIN)/python -m cassetta bench --budget $(BUDGET)

# What the host does for a block, without a GPU; HOST='--block UNet --rounds 3' for a part of it.
bench-host: $(VENV)/.bench
	PYTHONPATH=.:$$PYTHONPATH OMP_NUM_THREADS=1 $(BIN)/python bench/host.py $(HOST)

# On a GPU, with the packages that PYTHON has, or that lie in a folder named by PYTHONPATH, offline:
# both stop after BUDGET seconds, as does the second half of `bench`, and go on where they stopped when
# they are run again. Tests run in WORKERS processes where pytest-xdist is installed; a GPU that hangs
# takes one of them with it, where pytest-timeout is.
BUDGET ?= 400
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(max(1, min(14, (os.cpu_count() or 1) - 2)))')
LOG ?= test-gpu.log
GPU_TESTS = tests/test_gpu.py tests/test_graphs.py tests/test_recordings.py tests/test_programs.py \
	tests/test_chains.py tests/test_ops.py::test_inductor_finds_results_where_it_was_told \
	tests/test_golden.py tests/test_convolutions.py tests/test_pairwise.py tests/test_march.py \
	tests/test_boxes.py tests/test_passes.py tests/test_pool.py tests/test_resize.py tests/test_joined.py \
	tests/test_exchanged.py tests/test_fused.py
# $(call where,STATEMENT,WORDS): the words, if Python can run the statement
where = $(shell PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -c '$(1)' 2>/dev/null && echo '$(2)')

# inductor compiles in each process by itself: pools of processes in processes take longer to begin
test-gpu:
	PYTHONPATH=.:tests:$$PYTHONPATH TORCHINDUCTOR_COMPILE_THREADS=1 $(PYTHON) -m pytest $(GPU_TESTS) \
		-p budget --budget $(BUDGET) --resume --log $(LOG) \
		$(call where,import xdist,-n $(WORKERS) --dist load --maxschedchunk 1) \
		$(call where,import pytest_timeout,--timeout 120) \
		$(call where,import xdist; import pytest_timeout,--timeout-method thread) \
		-q --tb=short -rN --disable-warnings -o filterwarnings=default

bench-gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m cassetta bench --budget $(BUDGET)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks test-gpu.log

# a stamp per extra: installed again when pyproject.toml changes
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "cassetta needs Python 3.10 or newer; make PYTHON=python3.12 chooses one"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
