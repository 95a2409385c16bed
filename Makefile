# make test                every CPU test           make demo   a Llama, without and with us
# make test TORCH=2.11.0   router and op tests on another torch, in a virtual environment of its own
# make lint                ruff and mypy            make clean  removes the virtual environments
# make compile-all         every kernel with every option compiles, without spills; CI compiles a choice of them
# Each sets itself up: it needs Linux and Python >= 3.10, named by PYTHON where `python3` is another one.

PYTHON ?= python3
DEFAULT_TORCH := 2.13.0
TORCH ?= $(DEFAULT_TORCH)
VENV := .venv-$(TORCH)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

ifeq ($(TORCH),$(DEFAULT_TORCH))
TEST_EXTRAS := test cu13 demo
TESTS := tests
else
TEST_EXTRAS := test
TESTS = $(wildcard tests/test_router*.py tests/test_ops*.py)
endif
# A demo on a GPU needs what compiles the kernels.
DEMO_EXTRAS := demo $(if $(shell command -v nvidia-smi),cu13)

.PHONY: test compile-all demo lint format clean

test: $(TEST_EXTRAS:%=$(VENV)/.with-%)
	$(BIN)/python -m pytest $(TESTS)

compile-all: $(TEST_EXTRAS:%=$(VENV)/.with-%)
	FA_SDPA_COMPILE_ALL=1 $(BIN)/python -m pytest -q tests/test_kernels.py -k every_variant

demo: $(DEMO_EXTRAS:%=$(VENV)/.with-%)
	$(BIN)/python examples/demo.py

lint: $(VENV)/.with-lint $(VENV)/.with-demo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.with-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv-*

# torch comes first and pinned, so that no later step can pull in another one.
$(VENV)/.with-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fa_sdpa needs Python >= 3.10 and '$(PYTHON)' is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3.10"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install torch==$(TORCH)
	touch $@

$(VENV)/.with-%: $(VENV)/.with-torch pyproject.toml
	$(PIP) install torch==$(TORCH) -e '.[$*]'
	touch $@
