# The two commands that do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint types docs-examples environment clean

demo: $(VENV)/.demo-installed
	$(BIN)/evoopt evolve brax:inverted_double_pendulum --popsize 64 --budget 200 --seed 1 \
	    --set episode_length=500 --set sigma=0.1 --set learning_rate=0.05

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

docs-examples: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --doctest-modules evoopt

environment: $(VENV)/.installed

# What the demo needs: less to fetch than what the tests need.
$(VENV)/.demo-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[brax,plots]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[all,dev]'
	touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
