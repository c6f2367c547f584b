# make run    set up, make the sample data if there is none, run the quickstart
# make test   set up, run the tests
# make lab    set up, open the notebook in JupyterLab
# make clean  remove the environment and caches (data and runs stay)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: run test lab sample clean

run: sample
	mkdir -p runs/quickstart
	$(BIN)/papermill main.ipynb runs/quickstart/main.ipynb -f params/quickstart.yaml

test: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lab: sample
	$(BIN)/jupyter lab main.ipynb $(if $(SUDO),,--allow-root)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# what is missing of the sample, unless data/ holds rasters or tables of your own
sample: $(READY)
	@ls data/images data/datasets 2>/dev/null | grep '\.' | grep -qv '^sample_[123]\.' || $(BIN)/python sampledata.py --output data

# pip is checked by the stamp, not by the folder: an interrupted set-up is repeated
$(READY): requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@# Debian ships Python without the module that makes environments
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(SUDO) apt-get update && $(SUDO) apt-get install -y python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --prefer-binary -r requirements.txt -c constraints.txt
	touch $@
