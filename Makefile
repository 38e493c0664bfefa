# Everything a reader, a teacher or a contributor runs. Needs Python 3.11+ and make, nothing else.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
CODE := kfqn_core benchmarks tests tools conftest.py site

# Torch and BLAS threads of parallel workers wait for each other: one thread each.
export OMP_NUM_THREADS ?= 1
# nbgrader and JupyterLab start `jupyter` and kernels by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup test book chapters site lab student bench bench-full bench-gpu lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## create .venv and install everything, pinned by constraints.txt

.venv/.ready: pyproject.toml constraints.txt tools/jupyterlab-overrides.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This book needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	mkdir -p .venv/share/jupyter/lab/settings
	cp tools/jupyterlab-overrides.json .venv/share/jupyter/lab/settings/overrides.json
	@touch $@

test: setup ## unit tests, then every chapter
	$(BIN)/python -m pytest -q -n $(WORKERS)
	$(BIN)/python -m pytest -v --no-header -n $(WORKERS) --dist worksteal --nbmake chapters

book: chapters site ## execute what changed and build the site, out/html/index.html

chapters: setup ## execute the chapters that changed, out/notebooks
	@$(BIN)/python -m pytest -v --no-header -n $(WORKERS) --dist worksteal --nbmake --reuse chapters || { \
	  echo "A chapter failed, see above. The last good notebooks and site are untouched."; exit 1; }

site: setup ## build the site from the executed notebooks
	@$(BIN)/python -m tools.site

lab: setup ## open JupyterLab; the chapters open as notebooks
	$(BIN)/jupyter lab chapters

student: setup ## notebooks without solutions, out/student
	$(BIN)/python -m tools.student

bench: setup ## does a short benchmark order the methods as the committed results do? (15 minutes)
	$(BIN)/python -m benchmarks check

# Step costs first, with nothing else running; then two processes, on different problems.
RUN := $(BIN)/python -m benchmarks run
LONG := --horizon 10 --seeds 3 --budgets wall --methods kfqn kfqn-second-pass kbfgs-5 sgd adam muon soap
bench-full: setup ## run what is missing from benchmarks/results (hours), then write tables and figures
	$(RUN) --costs-only
	$(RUN) --problems P1 P2 P3 P7 & first=$$!; $(RUN) --problems P5 P6 && wait $$first
	$(RUN) $(LONG) --problems P1 P2 P3 P7 & first=$$!; $(RUN) $(LONG) --problems P5 P6 && wait $$first
	$(BIN)/python -m benchmarks report

bench-gpu: setup ## step costs at larger sizes on a GPU; without one, say what would run
	$(BIN)/python -m benchmarks gpu

lint: setup ## ruff, codespell, mypy, and the chapters' round trip through jupytext
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	rm -rf out/lint && mkdir -p out/lint
	for chapter in chapters/*.md; do \
	  $(BIN)/jupytext --quiet --to ipynb --output out/lint/$$(basename $$chapter .md).ipynb $$chapter || exit 1; done
	$(BIN)/ruff check --no-respect-gitignore out/lint
	$(BIN)/jupytext --quiet --to md:myst --test out/lint/*.ipynb
	$(BIN)/codespell
	$(BIN)/mypy

format: setup ## the code as ruff, the chapters as JupyterLab would save them
	$(BIN)/ruff format $(CODE)
	$(BIN)/jupytext --quiet --to md:myst $$(grep -l 'format_name: myst' chapters/*.md)

lock: setup ## write the versions of .venv to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## remove what was built, keep .venv
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis
