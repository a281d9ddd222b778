# make demo: ask the model that ships about a drawn scene.   make test: format, lint, types, tests.
# Both make their own .venv the first time. PIP="..." adds arguments to pip install, JOBS=N runs N tests at once.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP)

# A stamp for each set of packages; a second run starts at once.
RUN_STAMP = $(VENV)/.installed
TEST_STAMP = $(VENV)/.installed-test

.PHONY: demo test lint bench gpu-check gpu-check-training nano clean

demo: $(RUN_STAMP)
	$(BIN)/python generate.py

# Two processes of one thread each are faster than one of two, and do not fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy minillava kernels generate.py train.py

# Every kernel beside its peers; on a machine without a GPU a rehearsal at tiny sizes.
bench: $(TEST_STAMP)
	$(BIN)/python -m bench.report

# Tests and benches, then training at 7B shapes: nine minutes each on a card.
gpu-check: $(TEST_STAMP)
	$(BIN)/python bench/gpu_check.py

gpu-check-training: $(TEST_STAMP)
	$(BIN)/python bench/gpu_check.py --training

nano: $(RUN_STAMP)
	$(BIN)/python train.py

$(RUN_STAMP): pyproject.toml
	@echo "installing minillava into $(VENV) (the first time only)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	@echo "installing what tests and benches need"
	$(INSTALL) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
