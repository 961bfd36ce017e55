# `make demo` and `make test` are all the set-up there is: each makes .venv when it is missing or
# older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint bench compose-test clean

demo: $(READY)
	@echo "The demo computes for about a minute on two cores and writes to demo/."
	$(BIN)/polycollide run --source sample:mnist/3-0 --target sample:mnist/7-0 --preset paper-mnist --out demo/paper
	$(BIN)/polycollide run --source sample:mnist/3-0 --target sample:mnist/7-0 --model mnist-mlp --layer fc1 --out demo/defaults
	$(BIN)/polycollide reproduce table1

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/engine_step.py
	$(BIN)/python benchmarks/mnist_jobs.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/composition.py
	$(BIN)/python benchmarks/service.py

# Needs a Docker engine; the first build of the images takes long.
compose-test: $(READY)
	$(BIN)/python tests/docker/compose.py

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("polycollide needs Python 3.11 or newer; set PYTHON." if sys.version_info < (3, 11) else 0)'
	@echo "Installing into .venv: about 6 GB, nearly all of it torch; some minutes, once."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
