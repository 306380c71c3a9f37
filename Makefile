# Everything runs in a virtual environment made on first use. To use an environment that has torch
# and triton already, without installing anything:  make test PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Tests run on all cores, a file at a time: what a file's tests share is made in one process.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# on one core where pytest-xdist is not installed
parallel = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '$(PARALLEL)')

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
environment = # nothing to install
else
PY := $(VENV)/bin/python
environment = $(VENV)/$(1).stamp
endif

.PHONY: demo test test-all bench gpu-day lint audit clean

demo: $(call environment,demo)  ## train on MNIST and swap the fused blocks in, into demo_out/
	$(PY) -m examples.mnist --out demo_out $(ARGS)

test: $(call environment,test)  ## what this machine can run, but for what takes many minutes
	$(PY) -m pytest $(parallel) $(ARGS)

test-all: $(call environment,test)  ## all that this machine can run
	$(PY) -m pytest $(parallel) --complete $(ARGS)

bench: $(call environment,test)  ## providers side by side: table, JSON and plot, into bench_out/
	mkdir -p bench_out
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json=bench_out/run.json \
	    --report=bench_out $(ARGS)

gpu-day: $(call environment,test)  ## all that is to be measured on a GPU, 9.5 minutes a call
	$(PY) -m benchmarks.gpu_day --out bench_out/gpu-day $(ARGS)

lint: $(call environment,dev)  ## style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Of all that is installed, by public versions: no database knows torch's +cpu or +cu130. Packages
# that the service does not know are named and pass. One that knows none would pass all of them, so
# that it first has to find what is known since 2019.
audit_stdin = $(PY) -m pip_audit --disable-pip --no-deps -r /dev/stdin $(ARGS)

audit: $(call environment,dev) $(call environment,audit)  ## known vulnerabilities; needs the network
	@found=$$(echo 'jinja2==2.10' | $(audit_stdin) 2>&1); \
	case "$$found" in *"Found "*) ;; *) printf '%s\n' "$$found" \
	    'make audit: expected a service that finds the vulnerabilities of jinja2 2.10, got the above;' \
	    'nothing was audited. ARGS="--service osv" asks another one.' >&2; exit 1;; esac
	frozen=$$($(PY) -m pip freeze --exclude-editable) \
	    && echo "$$frozen" | sed 's/+[^ ;]*//' | $(audit_stdin)

clean:
	rm -rf $(VENV) bench_out demo_out build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
