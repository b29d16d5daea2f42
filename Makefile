# Everything a newcomer needs: `make demo` runs the main job, `make test` the tests. Both set up what is missing first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_CONSTRAINT :=
export OMP_NUM_THREADS ?= 1
export WANDB_MODE ?= offline

.PHONY: demo test check lint bench drill gpu image-check golden clean

demo: $(VENV)/ready          ## pack digits, train on two ranks, kill one, go on, evaluate, export, verify
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/ready lint     ## everything; the fast tests first
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not gpu"
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "slow and not gpu"

check: $(VENV)/ready lint    ## lint, types, fast tests: before every commit
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not ranks and not gpu"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready         ## the figures the README quotes that need no GPU
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.data --memory 1000000
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.pictures

drill: $(VENV)/ready         ## every fault on a run of its own: kills, signals, disks, damage; minutes
	$(BIN)/pretrain drill

gpu:                         ## tests and benchmarks that need a GPU, in one go
	bash benchmarks/gpu.sh

image-check: $(VENV)/ready   ## build the image without Docker and run it: root, buildah, debootstrap; docs/docker.md
	PRETRAIN_IMAGE_CHECK=1 $(BIN)/python -m pytest -n 0 -q tests/docker

golden: $(VENV)/ready        ## renew the golden losses, deliberately; the change is visible in the diff
	$(BIN)/python tests/golden/renew.py
	$(BIN)/python tests/test_docs.py
	$(BIN)/python tests/launch/test_render.py
	$(BIN)/python tests/plan/test_page.py
	$(BIN)/python tests/launch/test_cloud.py

# CPU builds of torch are a third of the size; with a GPU on board, let the index choose.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pretrain needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/peers/webdataset-0.2.86 webdataset==0.2.86  # what open_clip needs
	touch $@

clean:
	rm -rf $(VENV) runs build .mypy_cache .ruff_cache .pytest_cache
