# make help lists the targets. `make demo` and `make test` do all set-up themselves, in .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

PYTHON ?= python3
RESUME ?= auto
JOBS ?= 2
KILLS ?= 200
REPEATS ?= 3
FLOOR ?= $(addprefix tests/,recipe models data rollouts train) \
	$(addprefix tests/test_,$(addsuffix .py,catalog cli explain starting recipes))
BIN := .venv/bin
READY := .venv/ready
RLHF := $(BIN)/rlhf
TINY := recipes/tiny
DEMO := demo

# One thread: tensors this small gain nothing from more, and lose much on a busy machine. `make -j2 demo` uses two cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo loops test floor faults planted check audit bench docs dist clean gpu-check

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

# --- set-up ----------------------------------------------------------------------------------------------

setup: $(READY) ## make .venv and install the project with pinned versions (torch first)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, for instance: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# --- checks ----------------------------------------------------------------------------------------------

test: $(READY) ## run the tests: no network, no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

floor: ## the fast part of the tests with the oldest versions that are admitted (constraints-floor.txt, in build/floor)
	$(PYTHON) -m venv build/floor
	build/floor/bin/python -m pip install -q -c constraints-floor.txt torch==2.13.0 setuptools
	build/floor/bin/python -m pip install -q -c constraints-floor.txt --no-build-isolation -e '.[dev]'
	build/floor/bin/python -m pytest -n $(JOBS) --dist loadfile $(FLOOR)

faults: $(READY) ## kill runs at random moments (KILLS=200 SEED=any), start them again, compare bit for bit
	$(BIN)/python -m tests.faults.kills --kills $(KILLS) $(if $(SEED),--seed $(SEED))

planted: $(READY) ## plant each known PPO bug and show which test catches it
	$(BIN)/python -m tests.planted

check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(READY) ## compare the pinned versions with known faults (needs a network; pip-audit goes to build/audit)
	$(BIN)/python -m pip install -q --target build/audit pip-audit
	PYTHONPATH=build/audit $(BIN)/python -m pip_audit --no-deps --disable-pip -r constraints.txt

gpu-check: $(READY) ## what needs an NVIDIA GPU: marked tests and the tiny chain in bfloat16 and nf4
	scripts/gpu_check.sh

docs: ## the pages of docs/ as a site with a search, in build/site (needs a package index the first time)
	$(PYTHON) -m venv build/mkdocs
	build/mkdocs/bin/python -m pip install -q 'mkdocs-material>=9.6'
	NO_MKDOCS_2_WARNING=1 build/mkdocs/bin/mkdocs build --strict --quiet
	@echo 'build/site/index.html; with the search: $(PYTHON) -m http.server -d build/site'

dist: ## wheel and sdist in dist/, the wheel built from the sdist (needs a package index)
	$(PYTHON) -m venv build/packaging
	build/packaging/bin/python -m pip install -q build
	rm -rf dist
	build/packaging/bin/python -m build --outdir dist .

bench: $(READY) ## measure against TRL and write docs/BENCHMARKS.md (PARTS="growth floor" REPEATS=3 PAIRS=file; hours)
	$(BIN)/python scripts/bench/all.py $(PARTS) --repeats $(REPEATS) $(if $(PAIRS),--pairs $(PAIRS)) \
		$(if $(PEER),--peer $(PEER)) $(if $(PPO_PEER),--ppo-peer $(PPO_PEER))

# --- the demo: every run directory is a target -----------------------------------------------------------

METHODS := ppo dpo orpo simpo
RUNS := $(foreach run,pretrain sft rm $(METHODS),$(DEMO)/$(run)/DONE)

demo: $(READY) ## the whole chain on a tiny model, offline: sft -> train-rm -> ppo and sft -> dpo, orpo, simpo
	@if $(MAKE) -q --no-print-directory $(DEMO)/table.md; \
		then cat $(DEMO)/table.md; echo "demo is up to date"; \
		else $(MAKE) -j2 --no-print-directory $(DEMO)/table.md; fi

$(DEMO)/world/DONE: scripts/make_tiny.py scripts/tiny_grammar.py scripts/tiny_judged.py $(TINY)/reward.py | $(READY)
	$(BIN)/python scripts/make_tiny.py --out $(DEMO)/world

$(DEMO)/pretrain/DONE: $(TINY)/pretrain.yaml $(DEMO)/world/DONE
	$(RLHF) sft $< --resume $(RESUME)
	@touch $@

$(DEMO)/sft/DONE: $(TINY)/sft.yaml $(DEMO)/pretrain/DONE
	$(RLHF) sft $< --resume $(RESUME)
	@touch $@

$(DEMO)/rm/DONE: $(TINY)/rm.yaml $(DEMO)/sft/DONE
	$(RLHF) train-rm $< --resume $(RESUME)
	@touch $@

$(DEMO)/ppo/DONE: $(TINY)/ppo.yaml $(DEMO)/sft/DONE $(DEMO)/rm/DONE
	$(RLHF) ppo $< --resume $(RESUME)
	@touch $@

$(DEMO)/dpo/DONE: $(TINY)/dpo.yaml $(DEMO)/sft/DONE
	$(RLHF) dpo $< --resume $(RESUME)
	@touch $@

$(DEMO)/orpo/DONE: $(TINY)/orpo.yaml $(DEMO)/sft/DONE
	$(RLHF) orpo $< --resume $(RESUME)
	@touch $@

$(DEMO)/simpo/DONE: $(TINY)/simpo.yaml $(DEMO)/sft/DONE
	$(RLHF) simpo $< --resume $(RESUME)
	@touch $@

$(DEMO)/table.md: $(RUNS) scripts/demo_table.py
	$(BIN)/python scripts/demo_table.py --demo $(DEMO) --out $@

# --- the loops: a folder each ----------------------------------------------------------------------------

LOOPS := $(patsubst recipes/loops/%/Makefile,%,$(wildcard recipes/loops/*/Makefile))

loops: $(READY) ## every loop of recipes/loops on the demo's model, one after the other (about a quarter of an hour)
	@for loop in $(LOOPS); do echo "== $$loop"; $(MAKE) --no-print-directory -C recipes/loops/$$loop; done

clean: ## remove the demo's files and the tools' caches (not .venv, not runs/)
	rm -rf $(DEMO) loops eval build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
