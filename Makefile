# make demo   trains a real model on two oneCCL ranks
# make test   runs every test
#
# PYTHON  the interpreter                         (python3)
# STACK   knl or modern                           (knl on Python 3.9, modern from 3.10 on)
# VENV    where environments go, one a stack      (.venv)

PYTHON ?= python3
STACK ?=
VENV ?= .venv

INSTALL = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	{ echo "$(PYTHON) is not Python 3.9 or newer: name one with make PYTHON=/path/of/python3" >&2; exit 1; }; \
	venv=$$($(PYTHON) tools/install.py --venv "$(VENV)" --stack "$(STACK)" $(1)) || exit 1; bin="$$venv/bin"

.PHONY: demo test clean

demo:
	@$(call INSTALL); "$$bin/knl" train digits -n 2

test:
	@$(call INSTALL,--test); set -e; \
	"$$bin/ruff" check .; "$$bin/ruff" format --check .; "$$bin/mypy"; \
	"$$bin/python" -m pytest $(PYTEST)

clean:
	rm -rf "$(VENV)" build
