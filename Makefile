# make quickstart | test | check | install | openenv        Needs Python 3.11 and make, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TORCH := 2.13.0
# Two test processes: most tests wait more than they compute. tests/conftest.py says which may run beside which.
TWO := -n 2 --dist loadscope --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart install reasoning-gym qlora openenv programs test test-fast check docs clean

quickstart: install
	@$(BIN)/python examples/quickstart/make_model.py --out examples/quickstart/out
	@$(BIN)/rlx run examples/quickstart/quickstart.yaml --num-processes 2

install: .venv/installed

.venv/installed: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"rlx needs Python 3.11; {sys.executable} is {v[0]}.{v[1]}. Type: make PYTHON=/path/to/python3.11")'
	@echo "installing pinned dependencies into .venv (about 4 GB, a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -q --no-deps torch==$(TORCH)+cpu || $(PIP) install -q --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)
	@$(PIP) install -q --no-deps -r requirements/cpu.txt
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch .venv/installed

# Optional for users; its tests need it.
reasoning-gym: .venv/reasoning-gym

.venv/reasoning-gym: .venv/installed requirements/reasoning-gym.txt
	@$(PIP) install -q --no-deps -r requirements/reasoning-gym.txt
	@touch .venv/reasoning-gym

# Likewise.
qlora: .venv/qlora

.venv/qlora: .venv/installed requirements/qlora.txt
	@$(PIP) install -q --no-deps -r requirements/qlora.txt
	@touch .venv/qlora

# OpenEnv servers need versions that rlx's environment does not have.
openenv: .venv-openenv/installed

.venv-openenv/installed: requirements/openenv.txt
	@echo "installing OpenEnv into .venv-openenv, for its example and its tests"
	@$(PYTHON) -m venv .venv-openenv
	@.venv-openenv/bin/python -m pip --disable-pip-version-check install -q --no-deps -r requirements/openenv.txt
	@touch .venv-openenv/installed

# What the tests run beside Python.
programs:
	@for p in $$(cat .ci/debian); do command -v $$p >/dev/null || { \
	  echo "the tests need $$p; type: apt-get install --no-install-recommends $$(xargs < .ci/debian)" >&2; exit 1; }; done

test: programs install reasoning-gym qlora openenv
	@$(BIN)/python -m pytest $(TWO)

test-fast: install reasoning-gym qlora
	@$(BIN)/python -m pytest $(TWO) -m "not vllm and not slow"

check: install
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@PYTHONPATH=typings $(BIN)/lint-imports
	@$(BIN)/mypy

docs: install
	@$(BIN)/python -m rlx.config.reference

clean:
	rm -rf .venv .venv-openenv build *.egg-info
