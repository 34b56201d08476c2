# Everything a newcomer needs: make demo, make test, make bench, make lint. All of it stays in .venv.
.PHONY: demo test bench lint clean
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/python examples/taxi/demo.py

test: .venv/test
	$(BIN)/python -m pytest -q

bench: .venv/bench
	$(BIN)/python -m benchmarks

lint: .venv/lint .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv

# One stamp per set of dependencies: installed again only when pyproject.toml has changed.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quintet needs Python 3.11 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/test .venv/lint .venv/bench: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(@F)]'
	@touch $@
