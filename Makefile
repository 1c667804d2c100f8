.PHONY: demo test test-all style quality clean

PYTHON ?= python3
BIN := .venv/bin
SOURCES := hf_watermark tests examples benchmarks

# The environment is made anew whenever what it is made from changes.
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv: .venv/.ready

demo: .venv/.ready
	$(BIN)/hf-watermark demo --out demo-output

test: .venv/.ready
	$(BIN)/python -m pytest -m "not slow and not gpu and not online" -n 2

test-all: .venv/.ready
	$(BIN)/python -m pytest -m "not gpu and not online"

style: .venv/.ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: .venv/.ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf .venv demo-output build dist
