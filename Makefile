# Every target sets up what it needs; a fresh machine needs Python 3.11 or newer and nothing else.
ENV_DIR ?= .venv
PYTEST = $(ENV_DIR)/bin/python -m pytest
# Test files are spread over this many processes; a file stays whole, for its tests share what they start. They come by
# name: by number of tests, the whole runs of tests/e2e would begin last, and one process would wait for the other.
WORKERS ?= 2
export ENV_DIR

.PHONY: env test test-slow test-all soak quickstart gpu-check lint docs format clean

env:
	bash deploy_env.sh --dev

test: env
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not cluster" $(ARGS)

test-slow: env
	$(PYTEST) -m "slow or cluster" $(ARGS)

test-all: test test-slow

# A run that is killed twenty times, held against one that is not; some fifteen minutes.
soak: env
	PYTHONPATH=.:tests $(ENV_DIR)/bin/python -m support.kill_run $(ARGS)

quickstart: env
	$(ENV_DIR)/bin/python -m recipe.onpolicy_distill.quickstart $(ARGS)

# What of the CUDA path works here, in at most ten minutes; docs/gpu.md. ARGS="attention head" runs these parts alone.
gpu-check: env
	$(ENV_DIR)/bin/python -m scripts.gpu_check $(ARGS)

lint: env
	$(ENV_DIR)/bin/ruff check .
	$(ENV_DIR)/bin/ruff format --check .
	$(ENV_DIR)/bin/mypy
	$(ENV_DIR)/bin/shellcheck -x *.sh scripts/*.sh recipe/onpolicy_distill/*.sh .ci/run

# The site of docs/ in build/site; a link or an anchor that leads nowhere is an error.
docs: env
	NO_MKDOCS_2_WARNING=1 $(ENV_DIR)/bin/python -m mkdocs build --strict --quiet

format: env
	$(ENV_DIR)/bin/ruff check --fix .
	$(ENV_DIR)/bin/ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info
