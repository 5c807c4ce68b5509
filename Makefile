# make quickstart   install, train a small net on rendered images, evaluate it (about 3 minutes)
# make test         the tests (6 minutes on 2 fast cores, 25 on 2 slow ones)
# make test-fast    without the slow tests
# make test-all     also the end-to-end checks to run before a release
# make test-deploy  compares the networks with those of PyTorch, Keras, OpenCV, ... (installs them)
# make test-compilers  cross-compiles for TPUs and GPUs (installs their compilers; about 3 GB in all)
# make notebook     executes notebooks/alexnet.ipynb in runs/notebook (less than 5 minutes)
# make lint         ruff: rules and format
# To use another Python: `make test PYTHON=python3.12`. To pass arguments to pytest: `make test ARGS='-k layers'`.

PYTHON ?= python3
VENV := .venv
DEPLOY := .venv-deploy
COMPILERS := .venv-compilers
RUN := runs/quickstart
NOTEBOOK := runs/notebook
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
# The tests of a file run in one process, so that its fixtures (prepared stores, short runs) are made once.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# On Linux CPUs, training steps are faster if malloc keeps its memory (docs/devices.md, "Speed"). Other C
# libraries ignore this variable, and older versions of glibc ignore settings that they do not know.
quickstart notebook: export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.hugetlb=1

.PHONY: quickstart test test-fast test-all test-deploy test-compilers notebook lint clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m alexnet_jax.main --config=configs/quickstart.py --cpu_devices=2
	$(VENV)/bin/python -m alexnet_jax.evaluate $(RUN)
	@echo
	@echo 'The run is in $(RUN): metrics.jsonl (one row per interval), config.json, run.json, checkpoints/.'
	@echo 'Curves and kernels: $(VENV)/bin/tensorboard --logdir $(RUN)'
	@echo 'Next: "Your own images" and "ImageNet" in README.md.'

test: $(VENV)/.installed-dev
	$(PYTEST) -m 'not full and not deploy' $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m 'not slow and not full and not deploy' $(ARGS)

test-deploy: $(DEPLOY)/.installed
	$(DEPLOY)/bin/python -m pytest tests/deploy $(ARGS)

test-compilers: $(COMPILERS)/.installed
	$(COMPILERS)/bin/python -m pytest tests/experiments/test_compilers.py $(ARGS)

notebook: $(VENV)/.installed-notebook
	rm -rf $(NOTEBOOK) && mkdir -p $(NOTEBOOK) && cp notebooks/alexnet.ipynb $(NOTEBOOK)
	cd $(NOTEBOOK) && PYTHONPATH='$(CURDIR)' '$(abspath $(VENV))/bin/jupyter' execute --inplace alexnet.ipynb
	@echo 'The notebook with its results is $(NOTEBOOK)/alexnet.ipynb.'

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(DEPLOY) $(COMPILERS)

# A stamp is newer than the requirements files that it covers, so nothing is installed twice.
$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	@echo "Installing requirements.txt into $(VENV) (a minute or two, about 2 GB) ..."
	$(PIP_INSTALL) -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP_INSTALL) -r requirements-dev.txt -c constraints.txt
	@touch $@

$(VENV)/.installed-notebook: $(VENV)/.installed
	$(PIP_INSTALL) ipykernel nbclient -c constraints.txt
	@touch $@

$(DEPLOY)/.installed: requirements-deploy.txt requirements-dev.txt requirements.txt constraints.txt | $(DEPLOY)/bin/python
	@echo "Installing requirements-deploy.txt into $(DEPLOY) (about 3 GB) ..."
	@grep -v opencv constraints.txt > $(DEPLOY)/constraints.txt  # the tests need another version
	$(DEPLOY)/bin/python -m pip install --disable-pip-version-check --quiet -r requirements-deploy.txt -c $(DEPLOY)/constraints.txt
	@touch $@

$(COMPILERS)/.installed: requirements-compilers.txt requirements-dev.txt requirements.txt constraints.txt | $(COMPILERS)/bin/python
	@echo "Installing requirements-compilers.txt into $(COMPILERS) (about 3 GB in all) ..."
	$(COMPILERS)/bin/python -m pip install --disable-pip-version-check --quiet -r requirements-compilers.txt -c constraints.txt
	@touch $@

$(VENV)/bin/python $(DEPLOY)/bin/python $(COMPILERS)/bin/python:
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or later, or choose another: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; use Python 3.11 or later, for example: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(@D:/bin=)
