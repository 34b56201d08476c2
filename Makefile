# Everything a newcomer needs: make demo, make test, make bench, make lint. All of it stays in .venv, at the versions of
# constraints.txt; with NEWEST=1 in .venv-newest, at the newest ones that pyproject.toml allows.
.PHONY: demo test bench lint upgrade clean
PYTHON ?= python3
VENV := $(if $(NEWEST),.venv-newest,.venv)
BIN := $(VENV)/bin
VERSIONS := $(if $(NEWEST),--upgrade --upgrade-strategy eager,--constraint constraints.txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(VERSIONS)

demo: $(VENV)/demo
	$(BIN)/python examples/taxi/demo.py

test: $(VENV)/test
	$(BIN)/python -m pytest -q

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks

lint: $(VENV)/lint $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

# Pin the newest versions of everything, and run the tests with them.
upgrade:
	rm -rf .venv-newest
	$(MAKE) NEWEST=1 .venv-newest/test .venv-newest/lint .venv-newest/bench
	{ echo "# Every package of every set-up, pinned: 'make upgrade' renews it."; .venv-newest/bin/python -m pip freeze --exclude-editable; } > constraints.txt
	$(MAKE) test

clean:
	rm -rf .venv .venv-newest

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quintet needs Python 3.11 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of dependencies: installed again when pyproject.toml or constraints.txt has changed, the newest each
# time. The build's own packages are installed first: in an isolated build pip would take others than the pinned ones.
$(VENV)/demo $(VENV)/test $(VENV)/lint $(VENV)/bench: $(BIN)/python pyproject.toml constraints.txt $(if $(NEWEST),FORCE)
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation -e '.$(if $(filter demo,$(@F)),,[$(@F)])'
	@touch $@

FORCE:
