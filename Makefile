# make demo      all set-up, then the main job on the built-in task
# make test      all set-up, then the tests
# make test-all  the long tests too
# make check     lint, format and types
# make benchmark this trainer beside what people use today, about half an hour
# make gpu       on a GPU: tests that need one, kernels side by side, the comparison at true size
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all check install benchmark gpu
install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml
	@echo "installing about 2 GB of packages into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(INSTALLED)
	$(BIN)/python launch/demo.py

# Two files of tests at a time; of the long ones one, since they start jobs of several processes and time them.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: test
	$(BIN)/python -m pytest -m long

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py --work runs/benchmark
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/slope.py

gpu: $(INSTALLED)
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'there is no GPU here')"
	@failed=0; for program in "-m pytest tests/test_cuda.py" benchmarks/elementwise.py \
	  "benchmarks/loss.py --positions 8192" benchmarks/gpu.py; do \
	  echo "\n$$program"; $(BIN)/python $$program || failed=1; done; exit $$failed

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
