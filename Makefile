# Every target works on a fresh machine with Python 3.11 and make: the environment it needs is made first, in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PACKAGES := coordinator edge_client emulator kernels protocols
PROTOS := $(wildcard protocols/*.proto)

.PHONY: help demo test test-slow test-triton test-browser check format bench bench-federation bench-secagg bench-privacy bench-audit bench-offsite bench-devices protos clean

help:
	@echo "make demo       a federation of eight clients on this machine, in minutes"
	@echo "make test       the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-triton  installs Triton and tests its kernels in its interpreter"
	@echo "make test-browser  the tests that look at a page in Chromium, which has to be installed"
	@echo "make check      formatting, lint, types, import boundaries"
	@echo "make bench      the benchmark on SST-2; BENCH_ARGS are passed on"
	@echo "make bench-federation  round latency, download of bundles, memory of aggregation"
	@echo "make bench-secagg  secure aggregation beside Flower's SecAgg+"
	@echo "make bench-privacy  a step of DP-SGD beside those of Opacus"
	@echo "make bench-audit  the statistics of audits beside those of jax-privacy and scikit-learn"
	@echo "make bench-offsite  a client's step on an emulator beside LoRA and full fine-tuning; BENCH_ARGS are passed on"
	@echo "make bench-devices  memory, learning and bits of every tuning method; adapters of other ranks; replay of scalars"
	@echo "make format     reformat the code"
	@echo "make protos     generate the code for protocols/*.proto"

.venv/pip: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	@touch $@

.venv/product: .venv/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/product
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@mkdir -p .venv/typing/farfield  # mypy reads no import hooks, which is what an editable install is made of
	@ln -sfn $(PACKAGES:%=$(CURDIR)/%) .venv/typing/farfield/
	@touch $@

.venv/bench: .venv/product
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@touch $@

.venv/bench-audit: .venv/product
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench-audit]'
	@touch $@

.venv/browser: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	@touch $@

.venv/ray: .venv/product
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'
	@touch $@

.venv/triton: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check triton==3.7.1
	@touch $@

demo: .venv/product
	$(BIN)/coordinator simulate examples/quickstart.toml --clients 8 --compare --json runs/demo.json

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=2 --dist=loadfile --durations=5

test-slow: .venv/dev .venv/ray
	$(BIN)/pytest -m slow --durations=5

test-browser: .venv/browser
	$(BIN)/pytest -m browser

test-triton: .venv/triton
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -m triton tests/kernels

check: .venv/dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	MYPYPATH=.venv/typing $(BIN)/mypy -p farfield
	MYPYPATH=.venv/typing $(BIN)/mypy examples benchmarks
	MYPYPATH=.venv/typing $(BIN)/mypy tests
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/bench
	$(BIN)/python benchmarks/sst2.py $(BENCH_ARGS)

bench-federation: .venv/product
	$(BIN)/python benchmarks/round_latency.py
	$(BIN)/python benchmarks/bundles.py
	$(BIN)/python benchmarks/aggregation.py

bench-secagg: .venv/product
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/secure_aggregation.py

bench-privacy: .venv/product
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/dp_sgd.py

bench-audit: .venv/bench-audit
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/audit_statistics.py

bench-offsite: .venv/product
	$(BIN)/python benchmarks/offsite_speed.py $(BENCH_ARGS)

bench-devices: .venv/product
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py --predict
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods.py build/methods
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quantised.py build/quantised
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mixed_ranks.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/replay.py

protos: .venv/dev
	mkdir -p build/protos
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=farfield/protocols=protocols \
		--python_out=build/protos --mypy_out=quiet:build/protos $(PROTOS:%=farfield/%)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=farfield/protocols=protocols \
		--grpc_python_out=build/protos --mypy_grpc_out=quiet:build/protos farfield/protocols/federation.proto
	cp build/protos/farfield/protocols/*_pb2*.py* protocols/

clean:
	rm -rf .venv build dist *.egg-info
