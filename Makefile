# Two commands do everything on a fresh machine: `make demo` and `make test`. Both call `make setup` by themselves.
PYTHON ?= python3
VENV ?= .venv
MEGATRON_VERSION ?= 0.19.2
TORCH_VERSION ?= 2.13.0
# Where there is no GPU a CPU build is taken: from pip's own configuration if that offers one, else from this index.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-full test-slurm test-reliability test-nccl coverage soak lint docs wheel bench-data clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a small Hymba on real text, resume it once, draw its loss curves"
	@echo "make test       the default tests;  make test-full  all layouts and versions;  make test-reliability, make soak"
	@echo "make setup      only install, into $(VENV);  make lint, make docs, make wheel, make clean"

setup: $(STAMP)

# `--without-pip` and the outer pip, because Debian's python3 comes without ensurepip.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet pip

# Megatron-Core ships cp311 wheels that work, though its metadata asks for 3.12: hence --ignore-requires-python there.
$(STAMP): $(BIN)/python setup.py constraints.txt
ifeq ($(HAS_GPU),yes)
	$(PIP) install --quiet "torch==$(TORCH_VERSION)"
else
	$(PIP) install --quiet "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
	  $(PIP) install --quiet "torch==$(TORCH_VERSION)+cpu" --extra-index-url $(TORCH_CPU_INDEX)
endif
	$(PIP) install --quiet --no-deps --ignore-requires-python "megatron-core==$(MEGATRON_VERSION)"
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m launch.demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not slurm and not gpu and not multigpu" $(PYTEST_ARGS)

# Against real Slurm daemons on this machine (root; Debian packages slurm-wlm and munge).
test-slurm: setup
	$(BIN)/python -m pytest tests/slurm -m "slurm and not slow" $(PYTEST_ARGS)

# Kills, full disks, signals, other layouts, damage: every point of every sweep (docs/reliability.md). strace is needed.
test-reliability: setup
	$(BIN)/python -m pytest -m "reliability and not gpu and not multigpu" $(PYTEST_ARGS)

# Reliability over NCCL on two GPUs: the trainings of these tests run there, the tests themselves on the CPU.
RELIABILITY = tests/reliability
NCCL_TESTS = $(RELIABILITY)/test_two_ranks.py \
	$(RELIABILITY)/test_exact_resume.py::test_three_kills $(RELIABILITY)/test_exact_resume.py::test_the_index_names_every_file \
	$(RELIABILITY)/test_preemption.py::test_a_signal_to_one_rank \
	'$(RELIABILITY)/test_preemption.py::test_a_signal_to_torchrun[SIGUSR1]' \
	$(RELIABILITY)/test_background_saves.py \
	$(RELIABILITY)/test_hangs.py::test_an_endless_loop_a_held_lock_and_data_that_never_come
test-nccl: setup
	HYMBA_TEST_DEVICE=cuda $(BIN)/python -m pytest $(NCCL_TESTS) $(PYTEST_ARGS)

# Lines and branches that `make test` runs, child processes included: the table of docs/testing.md. Slower than the tests.
coverage: setup
	rm -rf build/coverage
	mkdir -p build/coverage
	-$(BIN)/python -m coverage run -m pytest -m "not slow and not slurm and not gpu and not multigpu" -o timeout=1800 $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage json --quiet -o build/coverage/report.json
	$(BIN)/python -m coverage html --quiet -d build/coverage/html
	$(BIN)/python -m tests.coverage_table build/coverage/report.json

# A training to which things keep happening: SOAK_MINUTES of it, from SOAK_SEED on. Exits with 1 if its log is not exact.
SOAK_MINUTES ?= 30
SOAK_SEED ?= 1
soak: setup
	$(BIN)/python -m tests.reliability.soak build/soak --minutes $(SOAK_MINUTES) --seed $(SOAK_SEED)

test-full: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/site; a link that leads nowhere is an error.
docs: setup
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

wheel: setup
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

# The bundled text with a tokenizer of the 1.5B's vocabulary size: input of experiment=bench_1p5b.
bench-data: setup
	$(BIN)/hymba data train-tokenizer --input data_prep/corpus/*.jsonl --vocab-size 32001 --output build/bench-data/tokenizer
	for domain in books speeches docs code; do $(BIN)/hymba data tokenize --input data_prep/corpus/$$domain.jsonl \
	  --tokenizer build/bench-data/tokenizer --output-prefix build/bench-data/$$domain || exit; done

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
