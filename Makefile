# make run    serve MODEL on HOST:PORT (the default model is fetched on first use)
# make test   everything that CI runs
# make venv   only set up .venv; make lint, make clean as their names say

PYTHON ?= python3
# Not taken from the environment, where shells and compilers put other things under this name.
HOST := 127.0.0.1
PORT ?= 8000
# A name or a checkpoint's directory; empty is the default model.
MODEL ?=
# Where Linux finds torch without CUDA; empty takes torch from the configured package index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
SETUP = @$(PYTHON) tools/venv.py --torch-index '$(TORCH_INDEX)'

.PHONY: run test lint venv venv-dev clean

run: venv
	@exec $(BIN)/python -m daedal serve $(if $(MODEL),'$(MODEL)') --host '$(HOST)' --port '$(PORT)'

venv:
	$(SETUP) --extra serve

venv-dev:
	$(SETUP) --extra dev --extra serve

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/floors.py
	$(BIN)/python tools/sizes.py

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
