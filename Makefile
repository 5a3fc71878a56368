# make demo      all set-up, then the main job on the built-in task
# make test      all set-up, then the tests
# make test-all  the long tests too
# make check     lint, format and types
# make benchmark this trainer beside what people use today, about half an hour
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all check install benchmark
install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml
	@echo "installing about 2 GB of packages into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(INSTALLED)
	$(BIN)/python launch/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "long or not long"

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py --work runs/benchmark
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/slope.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
