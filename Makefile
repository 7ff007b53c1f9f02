# PYTHON  the interpreter that `make setup` builds the environment from, and the one that `make gpu` runs on
# VENV    where the environment lies; another one for another Python: make test VENV=.venv312 PYTHON=python3.12
# JOBS    how many processes the tests use
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
endif
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# Only where the environment has no torch yet. PyPI's wheels for Linux bring gigabytes of CUDA libraries, this index's do not.
# With a GPU: make setup TORCH_INDEX=https://pypi.org/simple
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
READY := $(VENV)/.ready

demo test prove zoo docs examples screenshots: export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types docs site screenshots examples prove zoo bench gpu clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## create the environment and install autoshard into it (at once where that is done)

demo: $(READY)  ## train a GPT on four processes and on one, compare, leave programs, plan and picture in out/demo
	@$(BIN)/python examples/demo.py

test: $(READY)  ## run the tests on the CPU, all but the slow ones
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

check: lint types test docs examples  ## all that must be green: lint, types, tests, code blocks of the docs, examples

lint: $(READY)  ## ruff
	$(BIN)/ruff check

types: $(READY)  ## mypy
	$(BIN)/mypy

docs: $(READY)  ## run every Python block and command of the documentation
	$(BIN)/python .ci/run_code_blocks.py --jobs $(JOBS) README.md CONTRIBUTING.md $$(find docs -name '*.md' | sort)

# In an environment of its own: mkdocs reads the sources as text and needs neither torch nor the library. The variable
# silences the theme's notice on its own future.
SITE := out/docs-venv
site: $(SITE)/.ready  ## build the documentation as a site in out/site; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet
	@echo "out/site/index.html; with search: python3 -m http.server --directory out/site"

$(SITE)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 to 3.13 found: name one with PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install -q $$($(PYTHON) -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

screenshots: $(READY)  ## draw the pictures of README and docs again, into docs/images (needs chromium and dot)
	$(BIN)/python .ci/make_screenshots.py

examples: $(READY)  ## run every example, small
	$(BIN)/python examples/demo.py --small --steps 3 --out out/examples
	$(BIN)/python examples/custom_op.py
	$(BIN)/python examples/plan_llama.py
	$(BIN)/python examples/plan_llama_70b.py --layers 4
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_mlp.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_hf_llama.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_vit.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_unet.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_moe.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/resume_elsewhere.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/pipeline_uneven.py --out out/examples/pipeline

prove: $(READY)  ## run in full: 2,100 random graphs, each on several meshes and plans; every template and random plans on four processes
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -n $(JOBS) -m "(hypothesis or slow) and not zoo"

# Kept apart from the environment: their dependencies would bring a CUDA build of torch, and torchvision beside a CPU torch breaks imports.
ZOO := out/zoo-packages
zoo: $(READY)  ## partition every model of tests/zoo under every plan, write docs/coverage.md
	$(BIN)/python -m pip install -q --upgrade --target $(ZOO) --no-deps timm diffusers torchvision==0.28.0 requests importlib_metadata pillow zipp
	PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/$(ZOO) $(BIN)/python -m zoo.report --jobs $(JOBS)

bench: $(READY)  ## measure, and write the results to docs/benchmarks
	$(BIN)/python tests/benchmarks/run.py

gpu:  ## check and measure on this machine's GPU; installs nothing, uses the current Python or PYTHON
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) tests/gpu/run.py

clean:  ## remove what was built and written, the environment too
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 to 3.13 found: name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot create an environment: apt-get install python3-venv, or name another with PYTHON=" >&2; exit 1; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/python -m pip install -q --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install -q -e '.[dev]'
	@command -v dot >/dev/null || echo "graphviz's dot is missing, pictures stay .gv sources: apt-get install graphviz"
	@touch $@
