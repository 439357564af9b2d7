# Everything runs in .venv, made from the versions in constraints.txt. `make` alone lists the targets.
PYTHON ?= python3
EXTRAS := dev,bench
STAMP := .venv/.complete

# `make gpu` installs nothing: it takes the PYTHON that was given, or a .venv that is there, or python3.
ifeq ($(origin PYTHON),file)
GPU_PYTHON = $(if $(wildcard $(STAMP)),.venv/bin/python,$(PYTHON))
else
GPU_PYTHON = $(PYTHON)
endif
BENCHMARKS = $(addprefix benchmarks.step.,step_time layer norm step_profile)

.DEFAULT_GOAL := help
PYTHONS ?= .venv/bin/python
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help venv quickstart test test-all test-cpus faults lint format gpu bench scaling clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "Variables: PYTHON=python3  N=processes of quickstart  ARGS='arguments of pytest or of a benchmark'"
	@echo "           PYTHONS='those whose torch test-cpus tries'"

venv: $(STAMP) ## make .venv (the targets below do so when it is missing or out of date)

# The stamp is removed first and made last: what an interruption leaves behind is made anew. torch comes first
# because it brings the setuptools that builds our package, so that no second, unpinned one is downloaded.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "make: '$(PYTHON)' is not Python 3.10 or later; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: '$(PYTHON)' lacks venv; install it (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@echo "Making .venv from constraints.txt: a download of some minutes, once."
	@if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	@.venv/bin/python -m pip install --constraint constraints.txt torch setuptools
	@.venv/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

quickstart: $(STAMP) ## fine-tune the small model in launch/quickstart, sharded over all GPUs or over 2 processes
	@n='$(N)'; : "$${n:=$$(.venv/bin/python -c 'import torch; print(torch.cuda.is_available() and torch.cuda.device_count() or 2)')}"; \
	set -- .venv/bin/torchrun --standalone --nproc-per-node "$$n" launch/train.py --config configs/quickstart.yaml; \
	echo "DoRA fine-tuning of the model in launch/quickstart/model, sharded over $$n process(es):"; \
	echo "$$*"; "$$@"

test: $(STAMP) ## run the tests that guard every change (10 minutes)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## run all tests (25 minutes)
	$(PYTEST) $(ARGS)

test-cpus: $(STAMP) ## repeat the numeric tests with older CPUs' instructions and 2 threads, for each of PYTHONS
	.venv/bin/python tests/cpus.py $(PYTHONS)

faults: $(STAMP) ## run the fault suite (20 minutes), and renew the table in docs/reliability.md
	.venv/bin/python tests/faults/suite.py --write docs/reliability.md $(ARGS)

lint: $(STAMP) ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(STAMP) ## format the code and mend what ruff can
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

gpu: ## run the GPU tests and benchmarks with a Python that has torch; installs nothing
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

bench: $(STAMP) ## run a five-minute selection of the benchmarks, and renew the tables and figures
	@for module in $(BENCHMARKS); do .venv/bin/python -m "$$module" $(ARGS) || exit; done
	.venv/bin/python -m benchmarks.report

scaling: $(STAMP) ## measure weak and strong scaling over 1 and 2 processes of this machine, and draw the curves
	.venv/bin/python -m benchmarks.scaling --ranks 1 2 --strategies ddp fsdp zero3 --mode weak $(ARGS)
	.venv/bin/python -m benchmarks.scaling --ranks 1 2 --strategies ddp fsdp zero3 --mode strong $(ARGS)
	.venv/bin/python -m benchmarks.scaling --draw

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
