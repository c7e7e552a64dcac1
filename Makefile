# make demo | test | bench | report | style; each builds what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test bench report style

demo: $(STAMP)
	$(BIN)/stf-train

# Processes share the cores: threads that wait must sleep, not spin.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

bench: $(STAMP)
	$(BIN)/pytest bench/ --benchmark-only

report: $(STAMP)
	$(BIN)/python -m bench.report

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/host_cuda/*.h \
		tests/host_cuda/*.c*
	$(BIN)/mypy

# Compiled sources are not part of the stamp: after a change in csrc/, `make -B $(STAMP)`.
$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
