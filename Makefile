# `make` alone lists what there is. Every target does all the set-up that it needs.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# `make setup` puts nothing on PATH: the tools are run from .venv
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv and install everything; does nothing when all is there
	@$(PYTHON) tools/setup_env.py

demo: setup ## quantize MobileSAM to 6 bits on composed scenes, print the table and where the pictures lie
	$(BIN)/python tools/make_scenes.py
	$(BIN)/python tools/download.py mobile_sam
	$(BIN)/python tools/test_quant.py configs/demo/demo.py exp/mse/w6a6.yaml --eval-fp \
		--show-dir work_dirs/demo/masks --work-dir work_dirs/demo $(ARGS)

test: setup ## run the tests, on all cores; make test ARGS="-k rules" passes options to pytest
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## apply the formatting and the safe fixes that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
