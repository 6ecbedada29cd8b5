VENV ?= .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all lint setup setup-dev bench-allocation bench-cost bench-evaluation bench-formats bench-kernels bench-low-bits \
	bench-quality bench-quantize bench-heal bench-rl bench-rl-memory bench-super-weights bench-twins clean screenshots

demo: setup  ## analyze, plan, quantize and compare on the shipped model
	$(PY) examples/demo.py

test: setup-dev lint  ## lint, types and tests
	$(PY) -m pytest -m "not slow"

test-all: setup-dev lint  ## the long checks too
	$(PY) -m pytest

lint:
	$(PY) -m ruff check quantkit tests tools benchmarks examples
	$(PY) -m mypy

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || python3 -m venv $(VENV)
	$(PY) -m pip install -q -e .
	touch $@

# llama.cpp is built once into ~/.cache/quantkit; llama-cpp-python is laid on top of it (15 s instead of 9 min).
$(VENV)/.installed-dev: pyproject.toml tools/build_llama.py
	test -d $(VENV) || python3 -m venv $(VENV)
	$(PY) -m pip install -q "cmake>=3.26" "ninja>=1.11"
	$(PY) tools/build_llama.py
	$(PY) -m pip install -q -e ".[dev]"
	touch $@

bench-allocation: setup-dev  ## dynamic plans against llama-quantize at equal bytes (needs ../shared)
	$(PY) benchmarks/allocation.py

bench-cost: setup-dev  ## time of a dynamic file against llama-imatrix and llama-quantize, half an hour
	$(PY) benchmarks/cost.py $(ARGS)
	$(PY) tools/write_results.py

bench-evaluation: setup-dev  ## what judging is off by and costs, against llama-perplexity and lm-eval (needs ../shared; ARGS="--only kept")
	$(PY) benchmarks/evaluation.py $(ARGS); missed=$$?; $(PY) tools/write_results.py && exit $$missed

bench-formats: setup-dev  ## every format against ggml's C: encode, decode, compile
	$(PY) benchmarks/formats.py

bench-heal: setup-dev  ## what learned scales and an adapter give back (needs ../shared)
	$(PY) benchmarks/heal.py $(ARGS)

bench-kernels: setup-dev  ## products with packed weights, on the GPU if there is one (ARGS="--only Q4_K", ARGS=--cpu)
	$(PY) benchmarks/packed_kernels.py $(ARGS)

bench-low-bits: setup-dev  ## about 2 bits per weight: with and without I-quants (needs ../shared)
	$(PY) benchmarks/low_bits.py

bench-quality: setup-dev  ## all methods, llama-quantize and other quantizers at equal bytes (needs ../shared; ARGS=...)
	$(PY) benchmarks/quality.py $(ARGS)
	$(PY) tools/write_results.py

bench-quantize: setup-dev  ## wall time and memory against llama-quantize on a file of over 1 GB
	$(PY) benchmarks/quantize.py

bench-rl: setup-dev  ## GRPO on a 4-bit base: held-out accuracy, three seeds, a control, the full-precision twin
	$(PY) benchmarks/rl.py $(ARGS)

bench-rl-memory: setup-dev  ## memory of a step of training, by formula and measured (needs ../shared)
	$(PY) benchmarks/rl_memory.py

bench-super-weights: setup-dev  ## a planted super weight: collapse and rescue (needs ../shared)
	$(PY) benchmarks/super_weights.py

bench-twins: setup-dev  ## outlier twins against the plain models (needs ../shared)
	$(PY) benchmarks/twins.py

screenshots: setup-dev  ## pictures of a report for docs/images (needs Chromium)
	$(PY) tools/screenshots.py

clean:
	rm -rf demo *.quantkit build *.egg-info
