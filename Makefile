# Each target sets up what it needs: a virtual environment in .venv, installed anew only when
# pyproject.toml or constraints.txt has changed.  PYTHON=python3.12 make … picks an interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench chaos docs clean

demo: $(READY)
	$(BIN)/vlmchat chat --model-path demo --image examples/shapes.png -p "Describe the image." -p "What colour is the star?"

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check -q
	$(BIN)/ruff format -q --check
	$(BIN)/mypy --no-error-summary

bench: $(READY)
	$(BIN)/python -m benchmarks

chaos: $(READY)
	$(BIN)/python -m tools.chaos

docs: $(READY)
	$(BIN)/python -m tools.docs
	$(BIN)/python -m tools.sizing

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (once; torch is large) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
