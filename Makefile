# make demo   trains a real model on two oneCCL ranks, and writes a report with plots
# make test   runs every test
# make campaign   kills a real training KILLS times and compares its weights: reliability.md
#
# PYTHON  the interpreter                         (python3)
# STACK   knl or modern                           (knl on Python 3.9, modern from 3.10 on)
# VENV    where environments go, one a stack      (.venv)

PYTHON ?= python3
STACK ?=
VENV ?= .venv
KILLS ?= 100

INSTALL = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	{ echo "$(PYTHON) is not Python 3.9 or newer: name one with make PYTHON=/path/of/python3" >&2; exit 1; }; \
	venv=$$($(PYTHON) tools/install.py --venv "$(VENV)" --stack "$(STACK)" $(1)) || exit 1; bin="$$venv/bin"

.PHONY: demo test campaign clean

demo:
	@$(call INSTALL); run="runs/demo-$$(date +%Y%m%d-%H%M%S)"; \
	"$$bin/knl" train digits -n 2 --run-dir "$$run" && "$$bin/knl" report "$$run"

test:
	@$(call INSTALL,--test); set -e; \
	"$$bin/ruff" check .; "$$bin/ruff" format --check .; "$$bin/mypy"; \
	"$$bin/python" -m pytest $(PYTEST)

campaign:
	@$(call INSTALL,--test); "$$bin/python" -m tests.faults.campaign --kills $(KILLS)

clean:
	rm -rf "$(VENV)" build
