# Two commands for a newcomer: `make demo` and `make test`. Both make a virtual environment first.

PYTHON ?= python3
BIN := .venv/bin
# One process per core and one thread in each: more threads than cores only get in each other's way.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help venv demo docs test test-long test-peers readme-table fuzz chaos mutants bench-train gpu-check train-demos train-world lint types-page format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1	/' | expand -t 14

venv: .venv/.installed  ## a virtual environment with Pellucid and its development tools

# torch first and with its bound, so that pip takes the build that is at hand (CPU where that is all).
.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pellucid needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# PROMPT="some text" walks another prompt than the notebook's.
demo: venv  ## walk a famous prompt to its 42 through a shipped model: a page and figures in demo-out/
	mkdir -p demo-out
	$(BIN)/pellucid walk $(if $(PROMPT),"$(PROMPT)") --html demo-out/walk.html --plots demo-out/figures
	@echo
	@echo "The page:    $(CURDIR)/demo-out/walk.html"
	@echo "The figures: $(CURDIR)/demo-out/figures"

docs: venv  ## the documentation as a site, in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/python -m doctest docs/_site/aligned_docstrings.py docs/_site/notebook_links.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: venv lint  ## what CI runs: style, types, tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not peers and not long"

test-long: venv lint  ## the whole benchmarks: every seeded fault, every change of weights
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m long

test-peers: venv lint  ## everything, also against other implementations (installs transformers)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,peers]"
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

readme-table: venv  ## write the README's table of families from their rows
	PYTHONPATH=tests $(BIN)/python tests/families/test_readme_families.py

fuzz: venv  ## 20,000 damaged files, flags, templates and requests (docs/security.md)
	$(ONE_THREAD) $(BIN)/python tests/fuzz/fuzz_main.py --inputs 20000 --seed $(or $(SEED),0)

chaos: venv  ## 100 kill -9, full disks, SIGTERM, damaged checkpoints
	$(ONE_THREAD) $(BIN)/python tests/chaos/chaos_main.py --kills 100 --seed $(or $(SEED),0)

mutants: venv  ## 300 seeded mistakes in the core: do the tests find them?
	$(ONE_THREAD) $(BIN)/python tests/mutants/mutants_main.py --mutants 300 --seed $(or $(SEED),0)

bench-train: venv  ## training against nanoGPT's model compiled: speed, MFU, memory
	$(BIN)/python benchmarks/train_speed.py

TRAIN := OMP_NUM_THREADS=1 $(BIN)/pellucid train --micro-batch 8
# The models of the small world begin from the models of code, whose heads look back; twice the
# learning rate falls and begins anew.
WORLD := $(TRAIN) --world 0.8 --stdlib --batch 8 --dtype bfloat16
FIRST := --new-vocab --vocab 4096 --copies 0.15 --warmup 60 --hold 650 --steps 1250
MORE := --copies 0.1 --warmup 10
NAMES := --copies 0.1 --lr 0.0015 --warmup 20
train-world: venv  ## train the two models of the small world (docs/demo-world.md), into runs/; an hour and a half
	$(WORLD) --init stdlib $(FIRST) --stop 476 --out runs/demo-1
	$(WORLD) --init stdlib-gpt2 $(FIRST) --stop 469 --out runs/demo-gpt2-1
	for name in demo demo-gpt2; do \
		$(WORLD) --init runs/$$name-1/last $(MORE) --seed 2 --steps 320 --out runs/$$name-2 && \
		$(WORLD) --init runs/$$name-2/last $(MORE) --seed 3 --steps 280 --out runs/$$name-3 && \
		$(WORLD) --init runs/$$name-3/last $(NAMES) --seed 4 --hold 400 --steps 700 --out runs/$$name-4 \
		|| exit 1; done
	$(WORLD) --init runs/demo-4/last $(NAMES) --seed 5 --hold 300 --steps 520 --out runs/demo-5
	for name in demo-5 demo-gpt2-4; do \
		$(WORLD) --init runs/$$name/last --new-vocab --vocab 2048 $(NAMES) --seed 6 --hold 260 \
			--steps 420 --out runs/$$name-2048 || exit 1; done

train-demos: venv  ## train models like those that ship (docs/demos.md, demo-world.md), into runs/; three hours
	$(TRAIN) --stdlib --family llama --kv-heads 2 --copies 0.15 --steps 1800 --hold 1000 \
		--dtype bfloat16 --out runs/llama
	$(TRAIN) --stdlib --family gpt2 --copies 0.25 --steps 800 --hold 719 --out runs/gpt2-stage1
	$(TRAIN) --stdlib --init runs/gpt2-stage1/last --copies 1 --lr 0.002 --warmup 40 --seed 2 \
		--steps 850 --stop 800 --hold 470 --out runs/gpt2-stage2
	$(TRAIN) --stdlib --init runs/gpt2-stage2/last --copies 0.15 --lr 0.002 --warmup 40 --seed 3 \
		--steps 420 --hold 212 --dtype bfloat16 --out runs/gpt2
	$(MAKE) train-world

gpu-check: venv  ## a GPU in eight minutes: every family right on it, speed and memory; JSON
	$(BIN)/python benchmarks/gpu_check.py --out gpu-check.json

lint: venv  ## ruff and pyright
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

types-page:  ## types of the page's JavaScript by their JSDoc (needs npm; nothing is installed here)
	npx --yes --package typescript@5 tsc -p tests/serve/jsconfig.json

format: venv  ## write the code the way ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## forget everything that was made here
	rm -rf .venv demo-out site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
