# Everything runs in .venv, which the first target that needs it builds.
# ARGS is handed on, for example: make demo ARGS="--help", make test ARGS="-k masks"

PYTHON ?= python3
ARGS ?=
# Processes that tests run in; one file stays within one process.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCRATCH := .lint

# "3.11 ok", "3.10 old" or "missing".
python_found = $(shell $(PYTHON) -c 'import sys; v = sys.version_info; \
	print("%d.%d %s" % (v[0], v[1], "ok" if v >= (3, 11) else "old"))' 2>/dev/null || echo missing)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow simulate mutations bench evidence lint proto docs clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## fine-tune a small model on local workers that never see the data
	$(BIN)/blindtune demo $(ARGS)

test: $(INSTALLED) ## run the everyday tests
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(INSTALLED) ## run the slow tests
	$(BIN)/pytest -m slow --timeout 1800 -n $(JOBS) --dist loadfile $(ARGS)

simulate: $(INSTALLED) ## run the protocol on a simulated network, for as long as you like
	cd tests && HF_HUB_OFFLINE=1 ../$(BIN)/python -m simulation $(ARGS)

mutations: $(INSTALLED) ## plant classical mistakes in copies of the code; a test must notice each
	cd tests && HF_HUB_OFFLINE=1 ../$(BIN)/python -m mutations $(ARGS)

bench: $(INSTALLED) ## measure what a step costs, part by part; ARGS="--full" for all of it
	$(BIN)/python -m benchmarks.suite $(ARGS)

evidence: $(INSTALLED) ## the full tables of training; ARGS="--model MODEL --data FOLDER", hours
	$(BIN)/python -m benchmarks.evidence $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p blindtune

proto: $(INSTALLED) ## generate the code in proto/ from proto/worker.proto
	rm -rf $(SCRATCH)/proto && mkdir -p $(SCRATCH)/proto
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -Iblindtune/proto=proto \
		--python_out=$(SCRATCH)/proto --pyi_out=$(SCRATCH)/proto \
		--grpc_python_out=$(SCRATCH)/proto --mypy_grpc_out=$(SCRATCH)/proto \
		blindtune/proto/worker.proto
	mv $(SCRATCH)/proto/blindtune/proto/worker_pb2* proto/

docs: $(INSTALLED) ## generate docs/configuration.md, docs/blindtune.schema.json and tables of docs/environment.md
	$(BIN)/python -m blindtune.client.recipe.reference docs
	$(BIN)/python -m blindtune.server.reference docs

clean: ## remove what builds and checks leave behind
	rm -rf build dist $(SCRATCH) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and remove the environment
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml constraints.txt
	$(if $(filter missing,$(python_found)),$(error $(PYTHON) does not run; name a Python 3.11 or newer with PYTHON=/path/to/python3))
	$(if $(filter old,$(python_found)),$(error $(PYTHON) is Python $(firstword $(python_found)); name a Python 3.11 or newer with PYTHON=/path/to/python3))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@
