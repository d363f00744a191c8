# Every target does its own set-up, once: a virtual environment in .venv with the tested versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
OUT ?= runs/digits-edge

.PHONY: demo test check docs clean

demo: $(STAMP)  ## the whole pipeline on handwritten digits, no download
	$(BIN)/edgeqat run digits-edge -o $(OUT) --overwrite

test: $(STAMP)  ## every test, offline
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the site, into build/site; warnings are errors
	$(BIN)/python tools/tutorial_notebook.py
	$(BIN)/python -m mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
