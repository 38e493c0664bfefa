# Everything a reader, a teacher or a contributor runs. Needs Python 3.11+ and make, nothing else.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
CODE := kfqn_core benchmarks examples tests tools conftest.py site

# Torch and BLAS threads of parallel workers wait for each other: one thread each.
export OMP_NUM_THREADS ?= 1
# nbgrader and JupyterLab start `jupyter` and kernels by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup test frameworks book chapters budgets site lab student bench bench-full gpu lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## create .venv and install everything, pinned by constraints.txt

.venv/.ready: pyproject.toml constraints.txt tools/jupyterlab-overrides.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This book needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing the $$(wc -l < constraints.txt) packages of constraints.txt into .venv, about 2 GB with torch: minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
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

budgets: setup ## does every chapter keep its time? On a quiet machine, one after another
	$(BIN)/python -m pytest -v --no-header --nbmake --strict-budgets chapters

site: setup ## build the site from the executed notebooks
	@$(BIN)/python -m tools.site

# A backend that the shell names for all of matplotlib would take the pictures away.
lab: setup ## open JupyterLab; the chapters open as notebooks
	MPLBACKEND= $(BIN)/jupyter lab chapters

student: setup ## notebooks without solutions, out/student; the course they belong to, out/course
	$(BIN)/python -m tools.student

FRAMEWORKS ?= $(BIN)/python
frameworks: setup ## other people's models and trainers (transformers, Lightning, ...), those that FRAMEWORKS=python has
	PYTHONPATH=. $(FRAMEWORKS) -m pytest -q -rs -p no:cacheprovider tests/frameworks

bench: setup ## does a short benchmark order the methods as the committed results do? (15 minutes)
	$(BIN)/python -m benchmarks check

# Step costs first, with nothing else running; then two processes, on different problems of about the same work. P9 and
# P14 are run by name.
CONTESTANTS := kfqn kfqn-second-pass kbfgs-5 kfqn-2022-5 foof isaac sgd adam muon soap shampoo psgd kfac
RUN := $(BIN)/python -m benchmarks run --methods $(CONTESTANTS)
ONE := P2 P7 P3 P11 P15 P1 P5 P10
OTHER := P13 P12 P16 P17 P6 P8
bench-full: setup ## run what is missing from benchmarks/results (hours), then write tables and figures
	$(RUN) muon-bfloat16 --costs-only --problems $(ONE) $(OTHER)
	$(RUN) --problems $(ONE) & first=$$!; $(RUN) --problems $(OTHER) && wait $$first
	$(BIN)/python -m benchmarks report

gpu: setup ## all that a GPU shows, in eight minutes: right, fast, good; without one a rehearsal
	$(BIN)/python -m benchmarks gpu

lint: setup ## ruff, codespell, mypy, the floors' imports, and the chapters' round trip through jupytext
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	rm -rf out/lint && mkdir -p out/lint
	chapters=$$($(BIN)/python -m tools.manifest) && for chapter in $$chapters; do \
	  $(BIN)/jupytext --quiet --to ipynb --output out/lint/$$(basename $$chapter .md).ipynb $$chapter || exit 1; done
	$(BIN)/ruff check --no-respect-gitignore out/lint
	$(BIN)/jupytext --quiet --to md:myst --test out/lint/*.ipynb
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup ## the code as ruff, the chapters as JupyterLab would save them
	$(BIN)/ruff format $(CODE)
	chapters=$$($(BIN)/python -m tools.manifest) && $(BIN)/jupytext --quiet --to md:myst $$chapters

lock: setup ## write the versions of .venv to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

# out/course holds grades and answers that nobody can build again, out/student the release they belong to.
clean: ## remove what was built, keep .venv and a course (out/course, out/student)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@if [ -d out ]; then find out -mindepth 1 -maxdepth 1 ! -name course ! -name student -exec rm -rf {} +; fi
	@if [ -e out/course ] || [ -e out/student ]; then \
	  echo "Kept out/course and out/student: grades and answers cannot be built again. Remove them by hand."; \
	elif [ -d out ]; then rmdir out; fi
