# make demo: ask the model that ships about a drawn scene.   make test: format, lint, types, tests.
# Both make their own .venv the first time, with the torch that constraints.txt names. PIP="..." adds arguments to
# pip install, CONSTRAINTS=FILE takes other versions, JOBS=N runs N tests at once.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) $(PIP)

# A stamp for each set of packages; a second run starts at once.
RUN_STAMP = $(VENV)/.installed
TEST_STAMP = $(VENV)/.installed-test

.PHONY: demo test lint kernels-proof compile-table bench gpu-check gpu-check-training nano clean

demo: $(RUN_STAMP)
	$(BIN)/minillava ask
	@echo "next: . $(BIN)/activate    then, in any folder: minillava --help"

# Two processes of one thread each are faster than one of two, and do not fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy minillava kernels generate.py train.py

# Every shipped configuration of every kernel, compiled and run on the CPU against float64: minutes, no card.
kernels-proof: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "" tests/kernels/test_compiled.py

# The compile table and its tests under each Triton that pyproject.toml allows: minutes, 3 GB of packages.
compile-table: $(TEST_STAMP)
	$(BIN)/python -m minillava.kernels.tools.aot bench/results
	$(BIN)/python -m minillava.kernels.tools.every_triton $(VENV)/tritons

# Every kernel beside its peers; on a machine without a GPU a rehearsal at tiny sizes.
bench: $(TEST_STAMP)
	$(BIN)/python -m bench.report

# Tests and benches, then training at 7B shapes: nine minutes each on a card.
gpu-check: $(TEST_STAMP)
	$(BIN)/python bench/gpu_check.py

gpu-check-training: $(TEST_STAMP)
	$(BIN)/python bench/gpu_check.py --training

nano: $(RUN_STAMP)
	$(BIN)/minillava train

$(RUN_STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "installing minillava into $(VENV): once, mostly torch"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	@echo "installing what tests and benches need"
	$(INSTALL) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
