# Everything a reader, a teacher or a contributor runs. Needs Python 3.11+ and make, nothing else.

PYTHON ?= python3
WORKERS ?= 2
# Which build of torch: cpu; cuda (what PyPI has: gigabytes more on Linux); or another index of PyTorch's, such as cu126.
TORCH ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
TORCH_INDEX := $(if $(filter cuda,$(TORCH)),,--extra-index-url https://download.pytorch.org/whl/$(TORCH))
PORT ?= 8000
BIN := .venv/bin
CODE := kfqn_core benchmarks examples tests tools conftest.py site

# Torch and BLAS threads of parallel workers wait for each other: one thread each.
export OMP_NUM_THREADS ?= 1
# nbgrader and JupyterLab start `jupyter` and kernels by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Torch first and alone: its index knows nothing else, and where it cannot be reached pip warns and takes PyPI's build.
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup test mutants frameworks book chapter chapters budgets site serve pages axe slides pdf lab course grade formgrader bench bench-full gpu lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## create .venv and install everything, pinned by constraints.txt

.venv/.ready: pyproject.toml constraints.txt tools/jupyterlab-overrides.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This book needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing the $$(wc -l < constraints.txt) packages of constraints.txt into .venv, torch for '$(TORCH)': a few minutes."
	$(PYTHON) -m venv .venv
	@$(PIP) --no-deps torch $(TORCH_INDEX) && $(PIP) --editable '.[dev]' || { echo; \
	  echo "Setting up failed, see above; 'make setup' goes on where it stopped. The usual reasons:"; \
	  echo "  'No matching distribution' or 'Retrying': no network, or a proxy that pip has to be told of (HTTPS_PROXY)"; \
	  echo "  'No space left': .venv needs 2 GB, with TORCH=cuda several more"; \
	  echo "  'Permission denied': copy the book to a folder that is yours"; exit 1; }
	mkdir -p .venv/share/jupyter/lab/settings
	cp tools/jupyterlab-overrides.json .venv/share/jupyter/lab/settings/overrides.json
	@touch $@

test: setup ## unit tests, then every chapter
	$(BIN)/python -m pytest -q -n $(WORKERS)
	$(BIN)/python -m pytest -v --no-header -n $(WORKERS) --dist worksteal --nbmake chapters

RUN_CHAPTERS := $(BIN)/python -m pytest -v --no-header --nbmake --reuse
book: setup ## execute what changed and build the site, out/html/index.html
	@if $(MAKE) --no-print-directory chapters; then $(BIN)/python -m tools.site; \
	else $(BIN)/python -m tools.site --after-failure; echo "A chapter failed, see above."; exit 1; fi

chapter: setup ## execute one chapter and build its page alone, out/chapter: make chapter N=02
	@[ -n '$(N)' ] || { echo "Which chapter? For instance: make chapter N=02"; exit 1; }
	@file=$$($(BIN)/python -m tools.manifest '$(N)') || exit 1; $(RUN_CHAPTERS) $$file; ran=$$?; \
	$(BIN)/python -m tools.site --only '$(N)' && exit $$ran

chapters: setup ## execute the chapters that changed, out/notebooks
	@$(BIN)/python -m tools.notebooks
	@$(RUN_CHAPTERS) -n $(WORKERS) --dist worksteal chapters

budgets: setup ## does every chapter keep its time? On a quiet machine, one after another
	$(BIN)/python -m pytest -v --no-header --nbmake --strict-budgets chapters

site: setup ## build the site from the executed notebooks
	@$(BIN)/python -m tools.site

serve: setup ## serve the site at http://localhost:8000, where its search works (PORT=8000)
	@echo "http://localhost:$(PORT)   (Ctrl-C ends it)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory out/html $(PORT)

pages: site ## try the site in Chromium: nothing cut at 1280 and 400 pixels; axe-core's rules if `make axe` was here
	SITE=out/html $(BIN)/python -m pytest -q -rs tests/book/test_pages.py

axe: ## fetch axe-core with npm, for `make pages`
	npm install --silent --no-audit --no-fund --prefix out/axe axe-core@4.14.1

# Decks are made from executed notebooks: what changed is executed first.
slides: setup ## slides of every chapter, out/slides; N=02 for one
	@files=$$($(BIN)/python -m tools.manifest $(N)) || exit 1; \
	$(RUN_CHAPTERS) $$files && $(BIN)/python -m tools.slides $(N)

pdf: setup ## print the site without solutions, out/pdf (needs Chromium); N=02 for a chapter, EDITION=instructor with them
	@$(BIN)/python -m tools.pdf $(if $(N),--only '$(N)') $(if $(EDITION),--edition '$(EDITION)')

# Jupyter refuses to run as root unless it is told that this is meant, as in every container.
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)

# A backend that the shell names for all of matplotlib would take the pictures away.
lab: setup ## open JupyterLab; the chapters open as notebooks. Further flags: LAB=--no-browser
	MPLBACKEND= PYTHONPATH=$(CURDIR) $(BIN)/jupyter lab --config=tools/lab.py $(ROOT_FLAG) $(LAB) chapters

COURSE ?= course
RUN_COURSE = $(BIN)/python -m tools.course --course "$(COURSE)" $(if $(FORCE),--force)
course: setup ## exercises to hand out, COURSE=course/release; CHAPTERS="01 02" for some, FORCE=1 changes what was handed in
	$(RUN_COURSE) release $(CHAPTERS)

grade: setup ## grade what lies in COURSE=course/submitted/STUDENT/CHAPTER, and write feedback; CHAPTERS="01" for some
	$(RUN_COURSE) grade $(CHAPTERS)

formgrader: setup ## mark written answers in nbgrader's formgrader
	$(RUN_COURSE) formgrader

# What was found out about code that has not changed is not tried again; ROOMS="maths.secant.two_squares 07" names some,
# ROOMS="--again maths.secant.two_squares" tries once more what survived.
mutants: setup ## who notices a small mistake in a room? tests and checks, tools/mutants.jsonl (minutes)
	$(BIN)/python -m tools.mutants $(ROOMS)

FRAMEWORKS ?= $(BIN)/python
frameworks: setup ## other people's models and trainers (transformers, Lightning, ...), those that FRAMEWORKS=python has
	PYTHONPATH=. $(FRAMEWORKS) -m pytest -q -rs -p no:cacheprovider tests/frameworks tests/book/test_recipes.py

bench: setup ## does a short benchmark order the methods as the committed results do? (15 minutes)
	$(BIN)/python -m benchmarks check

# Step costs first, with nothing else running; then two processes, on different problems of about the same work. P9 and
# P14 are run by name.
CONTESTANTS := kfqn kfqn-second-pass kbfgs-5 kfqn-2022-5 foof isaac sgd adam muon muon-bfloat16 soap shampoo psgd kfac
RUN := $(BIN)/python -m benchmarks run --methods $(CONTESTANTS)
ONE := P2 P7 P3 P11 P15 P1 P5 P10
OTHER := P13 P12 P16 P17 P6 P8
bench-full: setup ## run what is missing from benchmarks/results (hours), then write tables and figures
	$(RUN) --costs-only --problems $(ONE) $(OTHER)
	$(RUN) --problems $(ONE) & first=$$!; $(RUN) --problems $(OTHER); second=$$?; wait $$first && exit $$second
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

clean: ## remove what was built, keep .venv and the course: nobody can build answers and grades again
	@if [ -e out/course ]; then echo "out/course holds grades and answers of an earlier version: move it away first."; exit 1; fi
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
