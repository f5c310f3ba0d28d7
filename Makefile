# Two commands: `make demo` runs the main job, `make test` all tests. Both set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where torch comes from. Empty: pip's default index (CUDA builds on Linux, several GB). CPU_TORCH=1: PyTorch's CPU builds.
CPU_TORCH ?=
TORCH_INDEX := $(if $(CPU_TORCH),--index-url https://download.pytorch.org/whl/cpu,)
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# Two test processes, a file each at a time, the longest files first: waiting for clusters to start overlaps with computing.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
FAST := tests/contract tests/unit tests/fuzz tests/families
SLOW := tests/e2e/test_main_job.py tests/e2e/test_chaos.py tests/ray tests/e2e/test_notebooks.py tests/e2e/test_resume.py tests/e2e/test_submitted_twice.py tests/e2e/test_bad_input.py

# `make families`: all model families of tests/families, not only the unlike ones of `make test`.

# `make fuzz`: so many mutations of configs, texts, overrides and data files per test; SEED tries others.
EXAMPLES ?= 5000
SEED ?= 0

.PHONY: demo test check fuzz families browser install clean

demo: $(STAMP)
	$(BIN)/safebasin run output.overwrite=true

test: $(STAMP)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --durations=25 $(SLOW) $(FAST)

check: $(STAMP)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(FAST)

fuzz: $(STAMP)
	SAFEBASIN_FUZZ_EXAMPLES=$(EXAMPLES) SAFEBASIN_FUZZ_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load --timeout 7200 tests/fuzz

families: $(STAMP)
	SAFEBASIN_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load tests/families

# Pages in headless Chromium, at 390 px, on paper, in dark mode. It needs a Chromium (Debian: apt-get install chromium) and fails without one.
browser: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "safebasin needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; give one with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): torch, ray, mlflow and what they need; about three minutes the first time"
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
