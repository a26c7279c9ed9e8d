# Two commands: `make book` and `make test`. Everything else is for people who change the book.
#   make book PROFILE=full DEVICE=cuda DATASET=cifar100 DATA_DIR=/data CHAPTERS=admm_tt
PYTHON ?= python3
VENV ?= .venv
CORES ?= all
PROFILE ?= quick
FUZZ_MINUTES ?= 10
BIN := $(VENV)/bin
INDEX := book/_build/html/index.html
# Settings for the chapters, handed to Snakemake only where given.
CONFIG := profile=$(PROFILE) $(if $(CHAPTERS),chapters=$(CHAPTERS)) $(if $(DEVICE),device=$(DEVICE)) \
  $(if $(DATASET),dataset=$(DATASET)) $(if $(MODEL),model=$(MODEL)) $(if $(DATA_DIR),data_dir=$(DATA_DIR)) \
  $(if $(SEED),seed=$(SEED)) $(if $(JOBS),jobs=$(JOBS))
SNAKEMAKE = $(BIN)/python -m snakemake --cores $(CORES) --quiet rules progress host --keep-going --rerun-incomplete --nolock

.PHONY: help book test browser sweep bench fuzz clean
help:
	@echo "make book     build the book with the quick profile; prints where it is"
	@echo "make test     lint, types and tests"
	@echo "make browser  open every page of the built book in headless Chromium"
	@echo "make sweep SWEEP=name   run a grid of book/sweeps.yml and collect its table (JOBS=8: eight cells at a time)"
	@echo "make bench    measure tdlib against its peers (most of an hour on a quiet core; BENCH=--quick: minutes)"
	@echo "make fuzz     damage and forge files of every kind for ten minutes (FUZZ_MINUTES=10) and count what came of it"
	@echo "make clean    remove what make book built (not .venv)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: install once, and again when the declared or pinned versions change.
$(VENV)/.book: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[book]" -c constraints.txt
	@touch $@
$(VENV)/.test: $(VENV)/.book
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[book,test]" -c constraints.txt
	@touch $@

book: $(VENV)/.book
	@rm -rf book/_build/failed
	@$(SNAKEMAKE) book --config $(CONFIG) || { $(BIN)/python -m tdbook failures; \
	  echo "make book failed (see above)" >&2; exit 1; }
	@echo "The book: $(CURDIR)/$(INDEX)"

test: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

browser: $(VENV)/.test
	$(BIN)/python -m pytest -q -p no:xdist tests/book/browser/test_book.py

sweep: $(VENV)/.book
	@$(SNAKEMAKE) sweep --config $(CONFIG) $(if $(SWEEP),sweep=$(SWEEP))

bench: $(VENV)/.book
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH)

fuzz: $(VENV)/.test
	FUZZ_MINUTES=$(FUZZ_MINUTES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:xdist tests/fuzz

clean:
	rm -rf book/_build .snakemake .pytest_cache .mypy_cache .ruff_cache
