# `make demo` and `make test` make their own virtual environment from the tested versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles the modules in use at their first import; compiling all of every package takes longer.
PIP := --quiet --disable-pip-version-check --no-compile
# Tests start many processes, each of which would compile torch and transformers if Python might not keep the outcome.
export PYTHONDONTWRITEBYTECODE :=
# Where there is no GPU, the tests compile the CUDA kernels themselves and nothing else could run them.
KERNELS := $(if $(shell command -v nvidia-smi),ON,OFF)
BUNDLE := engines/builds/micro-llava-0.25

.PHONY: demo test test-all check bench sbom clean

demo: $(VENV)/base.stamp
	$(BIN)/vtexport build --model micro-llava --keep 0.25 --out $(BUNDLE) --force
	$(BIN)/vtexport show $(BUNDLE) --image engines/micro-llava/example.png --prompt "what digit is red?" -o $(BUNDLE)-kept.png
	$(BIN)/vtexport run $(BUNDLE) --image engines/micro-llava/example.png --prompt "what digit is red?"

test: check
	$(BIN)/python -m pytest

# The longer suite, of which `make test` runs a sample: every case of every table, property tests at length.
test-all: check
	$(BIN)/python -m pytest -m '' --hypothesis-profile=long

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/accuracy.py --plot benchmarks/accuracy.png
	$(BIN)/python benchmarks/cpu.py

# What an installation with the tested versions consists of, as CycloneDX JSON. The tool has an environment of its own.
sbom: $(VENV)/base.stamp
	$(PYTHON) -m venv $(VENV)/sbom
	$(VENV)/sbom/bin/pip install $(PIP) cyclonedx-bom
	mkdir -p dist
	$(VENV)/sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		--of JSON -o dist/sbom.json

$(VENV)/base.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP) -c constraints.txt -C cmake.define.VTEXPORT_TWINS=ON \
		-C cmake.define.VTEXPORT_CUDA=$(KERNELS) -e '.[dev]'
	# TensorRT's headers, and its Python bindings for their names, for tests; their dependencies are only of use on a GPU.
	# CUDA's disassembler, by which tests read the kernels.
	$(BIN)/pip install $(PIP) --no-deps -c constraints.txt kernel-lens tensorrt-cu13-bindings \
		nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

clean:
	rm -rf $(VENV) build dist engines/builds
