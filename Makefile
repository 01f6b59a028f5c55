# Every target prepares .venv first (tools/venv.sh) and does so only once.
.DEFAULT_GOAL := help
.NOTPARALLEL:                 # two targets must not install into .venv at the same time
.PHONY: help demo test lint types docs bench wheel kernels-full mutants faults support clean
.PHONY: env-demo env-test env-docs env-bench

python := .venv/bin/python
export PYTHON TORCH           # tools/venv.sh reads them: make PYTHON=python3.12 test

PYTEST_FLAGS ?=
DEMO_FLAGS ?=

help:  ## show this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  %-12s  %s\n' "$$name" "$$text"; done

demo: env-demo  ## train a small network in float16 on four ranks, one of which overflows
	@.venv/bin/shardscale demo $(DEMO_FLAGS)

test: env-test  ## run the whole suite (PYTEST_FLAGS="-k verdict" runs a part)
	@$(python) -m pytest $(PYTEST_FLAGS)

lint: env-test  ## ruff
	@$(python) -m ruff check .

types: env-test  ## mypy --strict on the library
	@$(python) -m mypy

docs: env-docs  ## build the site into docs/_build/html; a warning is an error
	@$(python) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "The site is in docs/_build/html/index.html."

bench: env-bench  ## measure side by side with torch's own scalers
	@$(python) benchmarks/run.py

wheel: env-test  ## build the wheel into dist/ and test an installed copy of it
	@sh tools/wheel.sh

kernels-full: env-test  ## the whole grid of the GPU kernels, interpreted and compiled; minutes
	@KERNELS_FULL=1 $(python) -m pytest tests/kernels

mutants: env-test  ## break the library on purpose, line by line, and see that a test fails
	@$(python) tests/mutants/run.py

faults: env-test  ## break jobs on purpose and write the fault matrix into docs/faults.md
	@FAULT_MATRIX=docs/faults.md $(python) -m pytest tests/cluster

support: env-test  ## run the tests of parallelisms and write docs/support.md from their results
	@$(python) tests/ranks/support.py

clean:  ## remove all that make made, .venv included
	rm -rf .venv .venv-* docs/_build build dist shardscale.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f shardscale/kernels/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env-demo env-test env-docs env-bench:
	@sh tools/venv.sh $(@:env-%=%)
