# make train [ARGS="--train.max_steps 50"]    set-up, then the default run, on all GPUs of this machine or on its CPU
# make test  [ARGS="-k sampler"]              set-up, then the tests
# make test-slow                              set-up, then the slow tests (once a week)
# make bench [ARGS="--ranks 2"]               comparison with HF Trainer, Lightning and a bare loop (see benchmarks/README.md)
# make lint | format | check                  check style and types | fix the style | lint and test, as CI does
# make setup [PYTHON=python3.12] [TORCH=gpu]  set-up only, into .venv/ (see launch/setup.sh; TORCH=cu126: a build by name)
# make clean                                  removes .venv/ and caches, never runs/

PYTHON ?= python3
TORCH ?= auto
ARGS ?=
CORES = $(shell $(VENV) -c "from dist_trainer.distributed.machine import usable_cpus; print(usable_cpus())" 2>/dev/null || echo 2)
# Tests spend half of their time waiting for processes and timeouts: four workers keep two cores busy.
WORKERS ?= $(shell echo $$(( $(CORES) < 2 ? 2 : 4 )))
VENV := .venv/bin/python
STAMP := .venv/.set-up

# Containers often set PYTHONDONTWRITEBYTECODE: each process would then compile all it imports, which takes seconds for torch.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.venv/bytecode

.PHONY: train test test-slow bench lint format check setup clean again

train: setup
	PYTHON=$(VENV) launch/local.sh $(ARGS)

test: setup
	$(VENV) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup
	$(VENV) -m pytest --numprocesses $(WORKERS) --dist loadfile -m slow $(ARGS)

bench: $(STAMP)-bench
	$(VENV) -m benchmarks.compare $(ARGS)

lint: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m pyrefly check

format: setup
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

check: lint test

setup: $(STAMP)

$(STAMP): pyproject.toml launch/setup.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" launch/setup.sh

$(STAMP)-bench: $(STAMP)
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" EXTRAS=bench launch/setup.sh
	@touch $@

# Again if the folder was moved, or if the Python that .venv/ uses is gone.
ifneq ($(shell test -x $(VENV) && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): again
endif

# Again if TORCH names another build.
ifneq ($(TORCH),auto)
ifneq ($(shell cat .venv/.torch 2>/dev/null),$(TORCH))
$(STAMP): again
endif
endif

clean:
	rm -rf .venv .pytest_cache .ruff_cache
