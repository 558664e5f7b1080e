PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= demo-out
# Token ids [windows, length] of text for SmolLM2, and the interpreter of an environment with the libraries to compare with.
CALIB ?= brown_calib.npy
EVAL ?= brown_eval.npy
PEERS ?=
# Caches to measure, with options of `benchmarks/cache_accuracy.py`, and the file that rows are added to.
CACHES ?= kv8 kv4 kv2 kv4-kivi kv2-kivi
ROWS ?= build/cache.jsonl
# One thread per test process: on few cores more threads only fight.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help venv browser test lint sanitize demo bench accuracy caches clean

help: ## print this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,huggingface,onnx,triton]'
	touch $@

venv: $(INSTALLED) ## create .venv with the package (editable) and everything development needs

browser: ## install Chromium and its driver, which tests of the report drive (Debian, as root; elsewhere they are skipped)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
		echo "chromium and chromedriver are here"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
			|| echo "chromium could not be installed: tests of the report in a browser will be skipped"; \
	else \
		echo "no chromium or chromedriver: tests of the report in a browser will be skipped; on Debian: apt-get install chromium chromium-driver"; \
	fi

test: $(INSTALLED) ## everything CI needs: lint and all tests
	$(MAKE) lint
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(INSTALLED) ## ruff and mypy (strict)
	$(BIN)/ruff check .
	$(BIN)/mypy

sanitize: $(INSTALLED) ## every C++ kernel built under AddressSanitizer and UBSan, over the whole grid of its tests (needs g++)
	$(TEST_ENV) $(BIN)/python -m tests.codegen.cpp.sanitized

demo: $(INSTALLED) ## compile a real language model, let it speak, and show what each pass did
	$(BIN)/python examples/demo.py --out $(DEMO_OUT)

bench: $(INSTALLED) ## decode speed beside llama.cpp on the same model (needs llama-cpp-python)
	$(BIN)/python -m benchmarks.decode_cpu

accuracy: $(INSTALLED) ## KL and perplexity at each bit width: CALIB=ids.npy EVAL=ids.npy [PEERS=python with other libraries]
	$(BIN)/python -m benchmarks.accuracy --calib $(CALIB) --eval $(EVAL) $(if $(PEERS),--peers $(PEERS))

caches: $(INSTALLED) ## bits and KL of cache formats: CALIB=ids.npy EVAL=ids.npy [CACHES=names] [ROWS=file] [PEERS=python]
	mkdir -p $(dir $(ROWS))
	$(BIN)/python -m benchmarks.cache_accuracy --tokens $(EVAL) --calibration $(CALIB) --formats $(CACHES) --out $(ROWS) $(if $(PEERS),--peers $(PEERS))

clean: ## remove build outputs and caches; .venv stays
	rm -rf build dist *.egg-info $(DEMO_OUT) .mypy_cache .pytest_cache .ruff_cache
