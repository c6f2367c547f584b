# make run    set up, make the sample data if there is none, run the quickstart
# make test   set up, run the tests
# make test-long   the tests that take minutes: processes that are killed at random moments
# make test-browser   install Chromium, run the notebook in JupyterLab in it; screenshots in runs/browser
# make sample-run   run the quickstart, write it with its pictures to docs/sample_run.html, and the README's picture
# make bench  set up the peers, too, measure every stage beside them in short, write docs/benchmarks.md
# make lab    set up, open the notebook in JupyterLab; PARAMS=params/mine.yaml: with these parameters
# make clean  remove the environment and caches (data and runs stay)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_VENV := .bench-venv
BENCH_READY := $(BENCH_VENV)/.ready
NOTEBOOK := $(if $(PARAMS),lab_$(subst /,_,$(basename $(PARAMS))),main).ipynb
STAGES := clean tiling dask read train predict metrics memory hdr composite
# no password is asked for where nobody can type it
SUDO := $(shell [ "$$(id -u)" = 0 ] || { [ -t 0 ] && echo sudo; } || echo sudo -n)
PROBE := PYTHONPATH=. $(BIN)/python tests/browser.py

.PHONY: run sample-run test test-long test-browser chromium lab bench sample clean

run: sample
	mkdir -p runs/quickstart
	$(BIN)/papermill main.ipynb runs/quickstart/main.ipynb -f params/quickstart.yaml

sample-run: run
	$(BIN)/python docs/sample_run.py runs/quickstart/main.ipynb

test: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	# more threads than idle cores wait for each other; a file at a time on each, for what its tests share
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-long: $(READY)
	$(BIN)/python -m pytest -m long

test-browser: $(READY) chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

# a name is not enough: Ubuntu's chromium-browser asks for a snap
chromium: $(READY)
	@$(PROBE) 2>/dev/null || { $(SUDO) apt-get update -q && \
	  $(SUDO) apt-get install -y -q --no-install-recommends chromium && $(PROBE); }

lab: sample $(filter-out main.ipynb,$(NOTEBOOK))
	$(BIN)/jupyter lab $(NOTEBOOK) $(if $(SUDO),,--allow-root)

# made anew when parameters or notebook change; what was done in the one before stays beside it
lab_%.ipynb: $(PARAMS) main.ipynb | $(READY)
	$(BIN)/papermill --prepare-only main.ipynb $@.tmp -f $(PARAMS) -p INTERACTIVE True
	[ ! -e $@ ] || mv $@ $(basename $@).$$(date +%Y%m%d_%H%M%S).ipynb
	mv $@.tmp $@

# a stage that fails is left out of the report, and named at the end
bench: $(BENCH_READY)
	failed=; for stage in $(STAGES); do \
	  $(BENCH_VENV)/bin/python benchmarks/bench_$$stage.py --short --json runs/bench/$$stage.json || failed="$$failed $$stage"; \
	done; \
	$(BENCH_VENV)/bin/python benchmarks/report.py runs/bench && test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) $(BENCH_VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# what is missing of the sample, unless data/ holds rasters or tables of your own
sample: $(READY)
	@ls data/images data/datasets 2>/dev/null | grep '\.' | grep -qv '^sample_[123]\.\|^land_cover_\|^sky' || $(BIN)/python sampledata.py --output data

# pip is checked by the stamp, not by the folder: an interrupted set-up is repeated
$(READY): requirements.txt constraints.txt
	$(call make_environment,$(VENV),requirements.txt,constraints.txt)
	touch $@

# SAHI asks for opencv-python, which overwrites the cv2 of opencv-python-headless; see the file.
# DeepForest wants older safetensors than the project takes by itself, and they older others.
$(BENCH_READY): requirements-bench.txt requirements.txt constraints.txt
	grep -Ev '^(safetensors|huggingface_hub)==' constraints.txt > $(BENCH_VENV).tmp
	$(call make_environment,$(BENCH_VENV),requirements-bench.txt,$(BENCH_VENV).tmp)
	rm $(BENCH_VENV).tmp
	$(BENCH_VENV)/bin/python -m pip install --quiet --no-deps sahi==0.12.0
	touch $@

# of a folder, a file of requirements, and one of versions
define make_environment
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@# Debian ships Python without the module that makes environments
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(SUDO) apt-get update && $(SUDO) apt-get install -y python3-venv; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet --prefer-binary -r $(2) -c $(3)
endef
