# Every target sets up what it needs: a virtual environment, the pinned packages, the build. Start with `make demo` or `make test`.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.stamps
# Wheels are built and checked without torch around.
RELEASE_PY := $(VENV)/release/bin/python
# The oldest supported Triton, beside the pinned one: the kernels must compile with both.
OLD_TRITON := 3.6.0
# Development builds two architectures; an installation from source builds all of them.
export CUDAARCHS ?= 80-real;90-real
# Idle OpenMP threads that spin steal the cores of the ones that work.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Test processes: one for each core, eight at most. JOBS=1 runs the tests in pytest's own process.
JOBS ?= $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))

NATIVE_SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
PYTEST := $(PY) -m pytest -q $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist worksteal)

.PHONY: help docs docs-serve demo demo-quick demo-moe demo-mtp demo-ddp demo-trl demo-check demo-check-ci test test-slow gates bench bench-targets bench-scaling lint format wheel check-wheels test-torch-matrix sdist cibuildwheel gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP)/packages: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMP)
	$(PY) -m pip install -q $$(grep '^torch==' requirements-dev.txt)
	$(PY) -m pip install -q -r requirements-dev.txt
	@touch $@

$(STAMP)/build: $(STAMP)/packages $(NATIVE_SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(STAMP)/release: requirements-release.txt
	$(PYTHON) -m venv $(VENV)/release
	@mkdir -p $(STAMP)
	$(RELEASE_PY) -m pip install -q -r requirements-release.txt
	@touch $@

$(STAMP)/triton-$(OLD_TRITON): $(STAMP)/packages
	$(PY) -m pip install -q --no-deps --upgrade --target $(VENV)/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	@touch $@

$(STAMP)/trl: $(STAMP)/packages requirements-trl.txt
	$(PY) -m pip install -q -r requirements-trl.txt
	@touch $@

$(STAMP)/docs: $(STAMP)/packages requirements-docs.txt
	$(PY) -m pip install -q -r requirements-docs.txt
	@touch $@

demo: $(STAMP)/build  ## train a small language model through the stages of R1, on this machine; a few minutes
	$(PY) -m examples.r1 --output outputs/r1 --report outputs/r1/report.html --compare-vocabulary 32768

demo-quick: $(STAMP)/build  ## the same in less than a minute, with fewer and smaller steps
	$(PY) -m examples.r1 --quick --output outputs/r1-quick --report outputs/r1-quick/report.html

demo-moe: $(STAMP)/build  ## with a mixture of experts, its routes replayed
	$(PY) -m examples.r1 --model moe --output outputs/r1-moe --report outputs/r1-moe/report.html

demo-mtp: $(STAMP)/build  ## sampling with drafts of the model's own multi-token prediction
	$(PY) -m examples.r1 --mtp 1 --output outputs/r1-mtp --report outputs/r1-mtp/report.html

demo-ddp: $(STAMP)/build  ## the quick run on two processes, which share each group of samples
	$(BIN)/torchrun --nproc-per-node 2 -m examples.r1 --quick --output outputs/r1-ddp --report outputs/r1-ddp/report.html

demo-trl: $(STAMP)/build $(STAMP)/trl  ## TRL's own GRPOTrainer, as it is, patched and fused: time, memory, the same losses
	$(PY) -m examples.trl

demo-check: $(STAMP)/build  ## three seeds, MoE, drafts, FP8, and three controls, against their thresholds; experts in FP8 against bfloat16
	$(PY) -m examples.r1.checking.check --output outputs/r1-check --jobs $(JOBS)
	$(PY) -m examples.r1.checking.precision --jobs $(JOBS) --save outputs/r1-check/precision.json

demo-check-ci: $(STAMP)/build  ## one seed and the three controls
	$(PY) -m examples.r1.checking.check --output outputs/r1-check --jobs $(JOBS) --seeds 0 --only seed-0 sft-alone shuffled-rewards weak-judge

test: $(STAMP)/build  ## every test that needs no GPU and no long training
	$(PYTEST) -m "not slow and not gpu and not interpreter" python_tests
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter python_tests/interpreter

test-slow: $(STAMP)/build $(STAMP)/trl $(STAMP)/triton-$(OLD_TRITON)  ## learning runs, trainers, packaging, a quarter of the kernels with the oldest Triton
	$(PYTEST) -m slow python_tests
	PYTHONPATH=$(VENV)/triton-$(OLD_TRITON) GK_EXPECTED_TRITON=$(OLD_TRITON) $(PYTEST) -k "not cuda_kernel" python_tests/test_gates.py
	PYTHONPATH=$(VENV)/triton-$(OLD_TRITON) $(PY) -m bench.gates --compiler triton --sample 4 --json build/gates.json
	$(MAKE) demo-check-ci

gates: $(STAMP)/build $(STAMP)/triton-$(OLD_TRITON)  ## every kernel compiled for sm_80, sm_90 and sm_100 (FP8 products for sm_89 too), against its limits; its floor
	$(PY) -m bench.gates --beside $(VENV)/triton-$(OLD_TRITON)
	$(PY) -m bench.floors
	$(PY) -m bench.docs docs/kernels.md

bench: $(STAMP)/build  ## every op against eager PyTorch and torch.compile; the record, its pages and pictures
	$(PY) -m bench --save bench/results --plot docs/images
	$(PY) -m bench.fp8_bytes --save
	$(PY) -m bench.docs

bench-targets: $(STAMP)/build  ## the targets of the design on this machine, nine interleaved rounds; fails where one is missed by far
	$(PY) -m bench.targets; status=$$?; $(PY) -m bench.docs docs/benchmarks.md && exit $$status

bench-scaling: $(STAMP)/build  ## how time and memory grow with each size, against eager PyTorch; the record, its page and pictures
	$(PY) -m bench.scaling
	$(PY) -m bench.docs docs/benchmarks.md

docs: $(STAMP)/docs  ## the site of the documentation, into build/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)/docs  ## the same in a browser, renewed with every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(STAMP)/build docs  ## ruff, mypy, clang-format, the site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

format: $(STAMP)/packages  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

wheel: $(STAMP)/release  ## sdist, pure wheel, and a manylinux wheel for every Python found, for GRPO_KERNELS_ARCHS; ARGS='--python 3.12'
	$(RELEASE_PY) -m release.wheels $(ARGS)

check-wheels: $(STAMP)/release  ## what dist/ holds: contents, and an installation that verifies every op, with TORCH=2.13.0
	$(RELEASE_PY) -m release.check_wheel $(if $(TORCH),--torch $(TORCH)) $(ARGS) dist/*

test-torch-matrix: $(STAMP)/release  ## the native wheel of one Python in dist/ under TORCH='2.10.0 2.13.0', one after another
	$(RELEASE_PY) -m release.torch_matrix $(foreach torch,$(TORCH),--torch $(torch)) $(ARGS)

sdist: $(STAMP)/release  ## the sdist and the pure wheel alone
	$(RELEASE_PY) -m release.wheels --no-native

cibuildwheel: sdist  ## native wheels for every Python in a manylinux_2_28 image, which needs Docker or Podman
	env -u CUDAARCHS $(RELEASE_PY) -m cibuildwheel --platform linux --output-dir dist dist/*.tar.gz

gpu-check:  ## on a machine with a CUDA GPU, with its own Python: build, tests, benchmarks, sanitizer; REHEARSE=1 on a CPU
	$(PYTHON) -m bench.gpu_check $(ARGS)

clean:  ## remove builds and results
	rm -rf build dist outputs *.egg-info grpo_kernels/_C*.so $(STAMP)/build
