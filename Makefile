PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the newest torch whose ABI the native library targets; override for another build, e.g. TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0

.PHONY: native
# incremental rebuild of vmemory/_ops.so and vmemory/_host for development
native:
	$(BIN)/python setup.py -q build_ext --inplace --build-temp build/native
	$(BIN)/python setup.py -q build_py --build-lib build/lib
	cp build/lib/vmemory/_build.json vmemory/_build.json
