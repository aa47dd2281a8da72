# `make demo` needs nothing but Python >= 3.11. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers: the tests start real servers, which need the other cores.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
INPUTS := pyproject.toml constraints.txt scripts/venv

.PHONY: help demo test test-slow test-compose soak bench lint peers clean

help:
	@echo 'make demo       set up .venv and run the tour on real data (needs Python only)'
	@echo 'make test       all fast tests, under 10 minutes'
	@echo 'make test-slow  process kills and full rounds, under 30 minutes'
	@echo 'make test-compose  image and containers as a user starts them; needs a Docker engine'
	@echo 'make soak       full counts; SOAK_SECONDS=… says for how long'
	@echo 'make bench      measures against qemu-nbd, nbdkit and a QEMU mirror; BENCH=… passes options'
	@echo 'make lint       ruff and mypy'
	@echo 'make clean      removes .venv and caches'

demo: $(VENV)/.runtime
	$(BIN)/cdp demo

test: $(VENV)/.dev peers
	$(PYTEST) -m 'not slow and not soak and not compose' -n $(WORKERS) --dist loadgroup

test-slow: $(VENV)/.dev peers
	$(PYTEST) -m 'slow and not soak' -n $(WORKERS) --dist loadgroup --timeout 600

# Where there is no engine it says so in its last line, and that is all it says.
test-compose: $(VENV)/.dev peers
	@if docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then \
	    $(PYTEST) -m compose tests/compose; \
	else \
	    echo 'make test-compose: SKIPPED: no Docker engine with `docker compose` answers here.'; \
	fi

soak: $(VENV)/.dev peers
	CDP_PROFILE=soak $(PYTEST) -m 'slow or soak' --timeout 0

bench: $(VENV)/.dev peers
	$(BIN)/python -m tests.bench $(BENCH)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

peers:
	@scripts/peers

$(VENV)/.runtime: $(INPUTS)
	scripts/venv $(PYTHON) $(VENV) .
	@touch $@

$(VENV)/.dev: $(INPUTS)
	scripts/venv $(PYTHON) $(VENV) '.[dev]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find cdp appliance tests -name __pycache__ -type d -prune -exec rm -rf {} +
