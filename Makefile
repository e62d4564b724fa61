# make course   environment, then every notebook executed: executed notebooks and figures in build/, pages in build/site/
# make site     the pages again, of the notebooks as they were last executed; `make course` first if there are none
# make test     environment, then every test, the notebooks in profile smoke included (ARGS="-k house" for some of them)
# make test-lowest  the tests that need neither weights nor notebooks, on the lower ends of pyproject's ranges
# make test-browser  site and JupyterLab in Chromium, which must be installed: on phone and desk, every link, a slider, an answer
# make lab      environment, then JupyterLab on the notebooks
# make data     draw the images of the miniature data sets, where they are not drawn yet
# make figures  the figures of README and front page, in docs/figures/
# make reproduce  measure docs/results again, with its figures; interrupted, it goes on
# make gates    measure the miniature's people and models on development scenes again
# make clean    remove what the commands made, but not .venv, build/training and build/runs, which took long
#
# A real-model profile: DALLEFLAMINGO_PROFILE=colab make course. Another Python: make course PYTHON=/path/to/python3.12.
# Once .venv is made, nothing here needs a network.

export DALLEFLAMINGO_OUTPUT ?= $(CURDIR)/build

IN_RANGE := import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c "$(IN_RANGE)" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
DALLEFLAMINGO := $(BIN)/python -m dalleflamingo

# Named after what it holds, so that a checkout which only touches the two files does not install again.
MADE := .venv/made-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help course site test test-lowest test-browser lab data figures reproduce gates clean
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

course: data
	$(DALLEFLAMINGO) course --out build

site: $(MADE) build/course.json
	$(DALLEFLAMINGO) site

build/course.json:
	$(MAKE) course

# One process a core, a file at a time; the notebooks first, because they take longest.
test: export DALLEFLAMINGO_PROFILE = smoke
test: export DALLEFLAMINGO_OUTPUT = $(CURDIR)/build/test
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: data
	mkdir -p build/test/figures
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--nbmake --nbmake-timeout=600 -m "not browser" notebooks tests $(ARGS)

# In an environment of its own, with Python 3.11 or 3.12: the oldest releases have no wheels for later ones.
LOWEST := build/lowest
test-lowest: export HF_HUB_OFFLINE = 1
test-lowest: export OMP_NUM_THREADS = 1
test-lowest:
	"$(PYTHON)" -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install --only-binary=:all: --constraint $(LOWEST)/lowest.txt --editable '.[course,test]'
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests $(ARGS) \
		$(addprefix --ignore-glob=tests/test_,research_* miniature_* course_run* shipped* full_size* house* data_calls* memory_plan* real_profiles* \
		colab_cell*)

# Playwright drives the Chromium of this machine, so it downloads none.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-browser: export HF_HUB_OFFLINE = 1
test-browser: $(MADE)
	@test -n "$(CHROMIUM)" || { echo "There is no Chromium on this machine: on Debian it comes with" \
		"'apt install chromium'." >&2; exit 1; }
	$(BIN)/pip install --quiet --only-binary=:all: --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile -m browser \
		tests/test_site_browser.py tests/test_lab_browser.py $(ARGS)

# A kernel called python3 elsewhere on JUPYTER_PATH, or in the user's folder, is of another environment.
lab: export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter$(if $(JUPYTER_PATH),:$(JUPYTER_PATH))
lab: data
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
		$(if $(filter 0,$(shell id -u)),--allow-root)

data: $(MADE)
	$(DALLEFLAMINGO) data

figures: data
	$(DALLEFLAMINGO) research figures docs/figures

reproduce: data
	$(DALLEFLAMINGO) research planted
	$(DALLEFLAMINGO) research insight-1 --images 500 --candidates 25
	$(DALLEFLAMINGO) research insight-2 --images 500 --candidates 10
	$(DALLEFLAMINGO) research studies
	$(DALLEFLAMINGO) research variants --images 300
	$(DALLEFLAMINGO) research stability --images 200
	$(DALLEFLAMINGO) research understanding --images 200
	$(DALLEFLAMINGO) research live --seed 2026 --json docs/results/live.json
	$(DALLEFLAMINGO) research gradients
	$(DALLEFLAMINGO) research repair
	$(DALLEFLAMINGO) research cycle
	$(DALLEFLAMINGO) research cycle --trials
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/cycle.py
	$(DALLEFLAMINGO) research memory-plan
	$(DALLEFLAMINGO) research cycle-report
	$(DALLEFLAMINGO) research epsilon
	$(DALLEFLAMINGO) research definitions
	$(DALLEFLAMINGO) research scoreboard

gates: data
	$(DALLEFLAMINGO) research gates

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis dist *.egg-info
	if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name training ! -name runs -exec rm -rf {} +; fi

$(MADE):
	@test -n "$(PYTHON)" || { echo "There is no Python 3.11, 3.12 or 3.13 on this machine: install one, or name one" \
		"with 'make PYTHON=/path/to/python'." >&2; exit 1; }
	@"$(PYTHON)" -c "$(IN_RANGE)" || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: leave PYTHON out or name" \
		"another." >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" || { echo "$(PYTHON) has no module venv: on Debian and Ubuntu it comes" \
		"with 'apt install python3-venv'." >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --only-binary=:all: --constraint constraints.txt --editable '.[course,test]'
	rm -f .venv/made-*
	touch $@
