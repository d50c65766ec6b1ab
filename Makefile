# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists all.

# The first of these that is new enough makes the virtual environment.
PYTHON ?= python3 python3.13 python3.12 python3.11 python
VENV ?= .venv
# `cpu` accepts a build of torch without CUDA on a machine with an NVIDIA GPU.
TORCH ?= auto
DEMO_IMAGE ?= examples/chelsea.png
DEMO_OUT ?= results/demo
# Test processes, one thread each. pytest -n's words: a number, auto, or 0 for no extra process.
JOBS ?= auto
PYTEST_ARGS ?=
# make train-queue: for how long, and further words, such as --configs configs/cpu/carn-x4.yaml.
MINUTES ?= 60
QUEUE_ARGS ?=
# make results: where the benchmark sets are; the official weights; names of a part of it all.
DATA ?= load/benchmark
OFFICIAL ?=
MODELS ?=
SETS ?= Set5 Set14 BSD100
RESULTS_ARGS ?=

export PYTHON_CANDIDATES := $(PYTHON)

define set_up
@for candidate in $$PYTHON_CANDIDATES; do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		exec "$$candidate" -I utils/install.py --venv "$(VENV)" --torch $(TORCH) $(1); \
	fi; \
done; \
echo "set-up: Python 3.11 or newer is needed, and none of these is: $$PYTHON_CANDIDATES." \
	"Install it, or name it: make PYTHON=/path/to/python3.12" >&2; \
exit 2
endef

.PHONY: help demo test train-queue results lint format venv venv-dev

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | \
		awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: venv ## Super-resolve the bundled photograph with the bundled weights
	@"$(VENV)/bin/python" demo.py --img_path "$(DEMO_IMAGE)" --k 0 --out_dir "$(DEMO_OUT)"

test: venv-dev ## Run the tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$(VENV)/bin/python" -m pytest \
		-n $(JOBS) --maxprocesses 8 $(PYTEST_ARGS)

train-queue: venv ## Train all configs in turn for MINUTES, or go on with it
	@"$(VENV)/bin/python" -m engine.train_queue train --minutes $(MINUTES) $(QUEUE_ARGS)

results: venv ## Measure the released weights on DATA, and render results/
	@"$(VENV)/bin/python" -m benchmarks.results measure render --data "$(DATA)" \
		$(if $(OFFICIAL),--official "$(OFFICIAL)") --models $(MODELS) --sets $(SETS) $(RESULTS_ARGS)

lint: venv-dev ## Check style and types
	@"$(VENV)/bin/python" -m ruff check .
	@"$(VENV)/bin/python" -m ruff format --check .
	@"$(VENV)/bin/python" -m mypy .

format: venv-dev ## Rewrite the code in the project's style
	@"$(VENV)/bin/python" -m ruff check --fix .
	@"$(VENV)/bin/python" -m ruff format .

venv: ## Install what the scripts need into .venv
	$(call set_up)

venv-dev: ## Install what the tests need, too
	$(call set_up,--dev)
