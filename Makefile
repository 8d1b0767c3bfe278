# make demo   trains a real model on two oneCCL ranks, and writes a report with plots
# make test   runs every test
# make module PREFIX=/folder   installs knl as a module: for module use /folder/modulefiles
# make campaign   kills a real training KILLS times and compares its weights: reliability.md
#
# PYTHON  the interpreter                         (python3)
# STACK   knl or modern                           (knl on Python 3.9, modern from 3.10 on)
# VENV    where environments go, one a stack      (.venv)
# MPI     of make module: the site's MPI module, loaded with knl
# HIDDEN  of make module: 1 hides it from module avail; module load knl takes it all the same

PYTHON ?= python3
STACK ?=
VENV ?= .venv
KILLS ?= 100
PREFIX ?=
MPI ?=
HIDDEN ?=

# Tests of one process each run side by side; two by two those of jobs, which wait most of the time.
# Those of ranks, and of 512 nodes, want the machine to themselves; those of a KNL's instruction set
# patch a copy of oneDNN once.
SINGLE = tests/data tests/report tests/topology tests/unit
JOBS = tests/bundle tests/modules tests/slurm --ignore=tests/slurm/test_512.py
RANKS = tests/isa tests/faults tests/mpi tests/slurm/test_512.py

CHECK = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	{ echo "$(PYTHON) is not Python 3.9 or newer: name one with make PYTHON=/path/of/python3" >&2; exit 1; }
INSTALL = $(CHECK); \
	venv=$$($(PYTHON) tools/install.py --venv "$(VENV)" --stack "$(STACK)" $(1)) || exit 1; bin="$$venv/bin"

.PHONY: demo test module campaign clean

demo:
	@$(call INSTALL); run="runs/demo-$$(date +%Y%m%d-%H%M%S)"; \
	"$$bin/knl" train digits -n 2 --run-dir "$$run" && "$$bin/knl" report "$$run"

test:
	@$(call INSTALL,--test); set -e; \
	"$$bin/ruff" check .; "$$bin/ruff" format --check .; "$$bin/mypy"; \
	"$$bin/python" -m pytest -n auto --dist loadfile $(SINGLE) $(PYTEST); \
	"$$bin/python" -m pytest -n 2 --dist loadfile $(JOBS) $(PYTEST); \
	"$$bin/python" -m pytest $(RANKS) $(PYTEST)

module:
	@$(CHECK); $(PYTHON) tools/module.py --prefix "$(PREFIX)" --stack "$(STACK)" --mpi "$(MPI)" \
		$(if $(filter 1,$(HIDDEN)),--hidden)

campaign:
	@$(call INSTALL,--test); "$$bin/python" -m tests.faults.campaign --kills $(KILLS)

clean:
	rm -rf "$(VENV)" build
