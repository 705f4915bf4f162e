# make demo      teach a small text model to draw digits; results in out/demo/
# make draw      convert and heal SmolLM2, teach it coloured digits and emoji (hours on a CPU);
#                DRAW="--serve" then serves a page
# make test      run the test suite (under 10 minutes on 2 cores)
# make test-all  also run the slow tests: builds in empty environments, longer training
# make test-attacks   interrupt, kill and damage in every way that the suite tries a few of (hours)
# make test-sanitized  run the suite with AddressSanitizer and UBSan in the extension (GCC; 30 minutes)
# make test-scale    run the tests of sharded and quantised training, with DeepSpeed, TRL, Liger and
#                    bitsandbytes (10 minutes)
# make test-oldest   run the integration tests on the oldest supported transformers
# make bench     measure speed and memory against their targets, update the pages (10 minutes)
# make results   measure the claims about expert redundancy and about added experts (hours); all of
#                docs/results/redundancy.md needs RESULTS="--emoji FOLDER --real MODEL"
# make results-quick   repeat a few of these runs and compare them with the pages (15 minutes)
# make check-gpu-code   compile the GPU kernels, which needs no GPU, and report their resources:
#                every CUDA kernel, and of the Triton kernels a part that has all pairs of arguments
#                (GPU_CODE=--all: every one)
# make docs      build the reference, from docstrings, and the pages of docs/ into out/docs/
# make lint      check with ruff: lint and format
#
# Every target first sets up $(VENV). Variables:
#   TORCH    requirement for `pip install`; empty: keep the installed torch
#   VENV     the environment to use; created if it does not exist
#   PYTHON   the Python that creates it
#   PYTEST   arguments for pytest
#   ATTACKS  which attacks: ATTACKS="--attack-share 10% --attack-seed 1 -k patch_model"
#   DEMO, DRAW, BENCH, RESULTS, GPU_CODE   arguments for the demo, moe-kernels draw, benchmarks/run.py,
#            python/redundancy.py and tools/check_gpu_code.py

TORCH  ?= torch==2.13.0
VENV   ?= .venv
PYTHON ?= python3
PYTEST ?= -n 2 --dist worksteal
OLDEST_TRANSFORMERS := 5.17.0
COMMA := ,
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr

PY        := $(VENV)/bin/python
INSTALLED := $(VENV)/.moe-kernels-installed
TORCH_WAS := $(VENV)/.torch-requirement
SOURCES   := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
ifeq ($(strip $(VENV)),)
$(error VENV is empty: name a folder, such as VENV=.venv, or VENV=$$CONDA_PREFIX)
endif
# By default idle OpenMP threads spin, which slows down other processes.
export OMP_WAIT_POLICY ?= PASSIVE
# One thread per test process, since $(PYTEST) runs several processes.
RUN_TESTS  = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q $(PYTEST)
# Tests of the interface between moe_kernels and transformers.
INTEGRATION := tests/models tests/imaging/test_guidance.py tests/imaging/test_generation.py

# $(call install,environment,extra requirements,extras of the package, "test" by default):
# install torch, the build requirements, the package
define install
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(if $(strip $(TORCH)),$(1)/bin/python -m pip install -q $(TORCH))
$(1)/bin/python -m pip install -q "setuptools>=77" wheel ninja pybind11
$(1)/bin/python -m pip install -q --no-build-isolation -e ".[$(or $(3),test)]" $(2)
endef

.PHONY: demo draw test test-all test-attacks test-sanitized test-scale test-oldest bench results results-quick check-gpu-code docs lint format install clean FORCE

$(INSTALLED): $(SOURCES) $(TORCH_WAS)
	$(call install,$(VENV))
	touch $@

# Changes only if TORCH does, so nothing else causes a new installation.
$(TORCH_WAS): FORCE
	@mkdir -p $(@D)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(VENV)/bin/moe-kernels demo $(DEMO)

draw: $(INSTALLED)
	$(VENV)/bin/pip install --quiet gguf
	$(VENV)/bin/moe-kernels draw $(DRAW)

test: $(INSTALLED)
	$(call RUN_TESTS,$(VENV)) -m "not slow and not scale"

test-all: $(INSTALLED)
	$(call RUN_TESTS,$(VENV)) -m "not scale"

test-attacks: $(INSTALLED)
	$(call RUN_TESTS,$(VENV)) tests/attacks --attack-share 100% $(ATTACKS)

# test_build.py starts compilers and creates environments, which a preloaded sanitizer disturbs.
test-sanitized: $(INSTALLED)
	CFLAGS="$(SANITIZE) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" $(PY) setup.py -q build \
		--build-lib build/sanitized --build-temp build/sanitized-objects
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=build/sanitized OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q $(PYTEST) \
		-m "not slow and not scale" --ignore tests/native/test_build.py

# In an environment of its own: DeepSpeed and TRL are heavy, and change what transformers does.
test-scale: $(SOURCES)
	$(call install,$(VENV)-scale,,test$(COMMA)scale)
	$(call RUN_TESTS,$(VENV)-scale) tests/scale

test-oldest: $(SOURCES)
	$(call install,$(VENV)-oldest,transformers==$(OLDEST_TRANSFORMERS))
	$(call RUN_TESTS,$(VENV)-oldest) -m "not slow and not scale" $(INTEGRATION)

bench: $(INSTALLED)
	$(PY) benchmarks/run.py --device cpu $(BENCH)
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/tables.py

results: $(INSTALLED)
	$(PY) python/redundancy.py $(RESULTS)
	$(PY) python/moextend.py

results-quick: $(INSTALLED)
	$(PY) python/redundancy.py --remake
	$(PY) python/moextend.py --remake

check-gpu-code: $(INSTALLED)
	$(PY) tools/cost_model.py
	$(PY) tools/check_gpu_code.py $(GPU_CODE)

docs: $(INSTALLED)
	$(PY) tools/build_reference.py

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info moe_kernels/*.so moe_kernels/_build_info.json $(INSTALLED)
