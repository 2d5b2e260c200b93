# make demo and make test each work in a fresh clone with Python 3.11 (venv, pip), make and g++; nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(shell find ov_ext/cpu_plugin -name '*.cpp' -o -name '*.hpp' -o -name CMakeLists.txt)
C_SOURCES := $(shell find ov_ext tests -name '*.cpp' -o -name '*.hpp' -o -name '*.c' -o -name '*.h')

# Processes that run tests, each with one thread. pytest alone runs them in one process.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# OpenVINO takes other paths on one CPU, where it loses errors: these tests run there once more.
ON_ONE_CPU := $(addprefix tests/cpu_plugin/test_,operation.py untrusted.py errors.py)

# How long `make fuzz` and `make soak` take, in seconds.
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 60

.PHONY: demo test test-quick bench lint format fuzz soak wheel clean

demo: $(VENV)/.built
	$(BIN)/python samples/01_sparse_int4_llm.py

test: lint
	$(PYTEST)
	taskset -c 0 $(BIN)/python -m pytest -q $(ON_ONE_CPU)

# Unit tests that need no model and no compiler: for while you work.
test-quick: $(VENV)/.built
	$(PYTEST) -q -m 'not slow'

bench: $(VENV)/.bench $(VENV)/.built
	$(BIN)/python -m benchmarks

# With libFuzzer (clang++) or AFL++ where installed, else with the fuzzer's own driver.
fuzz: $(VENV)/.built
	$(BIN)/python -m tests.cpu_plugin.fuzz --seconds $(FUZZ_SECONDS)

soak: $(VENV)/.built
	OV_EXT_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -s tests/ov_ext/test_soak.py

# A source distribution, and from it a wheel whose platform tag says which C library it needs: that of the machine it is built on, or
# an older one. OpenVINO and its TBB stay outside: the extension is loaded into them. In the container manylinux_2_28_x86_64 the same
# command makes a wheel for all systems that OpenVINO supports.
wheel: $(VENV)/.installed
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist
	mkdir -p dist && mv build/dist/*.tar.gz dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libopenvino.so.*' --exclude 'libtbb.so.*' --wheel-dir dist build/dist/*.whl

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

# PyTorch goes first, alone, so that the build pip is configured for is the one that stays. optimum-intel declares torchvision,
# whose CUDA build breaks `import transformers` beside a CPU build of PyTorch: it is removed unless it imports.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[test]' 'torch==2.13.0'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	touch $@ && touch $(VENV)/.built

# For changed sources. The installation above has just built the extension, and make would do it again.
$(VENV)/.built: $(VENV)/.installed $(CPP)
	test -f $@ && test -z "$$(find $(CPP) -newer $@)" || $(BIN)/pip install --quiet --no-deps -e .
	touch $@

# llama.cpp is optional: without it the table says so. GCC 12 sees only 8 of the 64 bytes that `ldtilecfg` reads and drops stores to
# the others, so that llama.cpp crashes on CPUs with AMX: hence the flags.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[bench]' 'torch==2.13.0'
	-CXXFLAGS='-fno-tree-dse -fno-dse' CMAKE_ARGS=-DGGML_NATIVE=ON \
		$(BIN)/pip install --quiet 'llama-cpp-python>=0.3.36' 'gguf>=0.17'
	touch $@

clean:
	rm -rf build $(VENV) ov_ext/libov_ext_cpu.* ov_ext/_build_info.py
