# Everything runs in .venv, which `make setup` builds from requirements-local.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Hub look-ups would only slow a local run down: it uses local files alone. `make run HF_HUB_OFFLINE=0` allows them.
export HF_HUB_OFFLINE ?= 1
export UNSLOTH_DISABLE_STATISTICS ?= 1
TEST_RUN := runs/test

.DEFAULT_GOAL := help
.PHONY: help setup model llama-cpp notebooks run record lint unit test lock colab-rehearsal proof-tools location clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(READY)  ## build .venv (once)

$(READY): requirements-local.txt
	@start=$$(date +%s); \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11, 3.12 or 3.13 is needed, found $$($(PYTHON) --version). Fix: make setup PYTHON=python3.11"; exit 1; }; \
	echo "Building .venv ..."; $(PYTHON) -m venv --clear .venv && \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements-local.txt torch && \
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-local.txt && \
	touch $(READY) && echo ".venv is ready: $$(( $$(date +%s) - start )) s"

model: $(READY)  ## prepare the cpu profile's model (once, into the cache)
	@python -m helpers.smollm2

llama-cpp: $(READY)  ## build llama.cpp for chapter 06 (once, into the cache; about six minutes)
	@python -m helpers.gguf

notebooks: $(READY)  ## build the notebooks from notebooks/src
	@python notebooks/build.py

run: model llama-cpp notebooks  ## run the six chapters and print one table
	@python -m helpers.series --fresh

record: run  ## run, then keep the outputs in the committed notebooks and the README
	@cp runs/cpu/executed/measured.json notebooks/measured.json
	@python notebooks/build.py --outputs-from runs/cpu/executed

lint: $(READY)  ## check code and notebooks
	@ruff check . && ruff format --check . && python notebooks/build.py --check && pytest tests/test_notebooks.py

unit: model llama-cpp  ## run the tests
	@pytest

test: lint unit  ## lint, tests, and the whole series on the cpu profile
	@python -m helpers.series --fresh -p PROFILE cpu -p RUN_DIR $(CURDIR)/$(TEST_RUN)

lock: $(READY)  ## resolve requirements-colab.txt against the image's freeze again
	@python -m helpers.lock

colab-rehearsal: $(READY)  ## chapters 01-04 in an environment like Colab's (Python 3.13)
	@python -m helpers.rehearsal

proof-tools: $(READY)  ## JupyterLab, a browser driver and Go, for two tests that are skipped without them
	@$(PYTHON) -m venv --clear .venv-proof && \
	.venv-proof/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-proof.txt && \
	python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(.venv-proof/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/series.pth"

location: $(READY)  ## make location REPOSITORY=owner/name: rewrite badges and the setup cell
	@python notebooks/build.py --location $(REPOSITORY)

clean:  ## delete .venv (the runs stay)
	rm -rf .venv
