# Everything from a bare checkout: only make and Python 3.10-3.13 are needed. `make` lists the targets.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= 2

# The interpreter that .venv is made with: the first of these that fits, or the one of `make PYTHON=...`.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)

.PHONY: help install demo effect test lint typecheck unit format wheel clean distclean
.DEFAULT_GOAL := help

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(INSTALLED) ## Create .venv and install clipbench and its tools into it (the other targets do it by themselves)

demo: $(INSTALLED) ## Label, train, register and probe on rendered rooms, in under five minutes on 2 cores
	$(BIN)/clipbench demo

effect: $(INSTALLED) ## Does CLIPTeX beat CLIP-FT on toyworld? A study of up to 90 minutes on 2 cores; EFFECT=--quick tries it
	$(BIN)/python benchmarks/effect.py $(EFFECT)

test: lint typecheck unit ## Lint, check types, run the tests

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED) ## mypy
	$(BIN)/mypy

unit: $(INSTALLED) ## The tests alone, in JOBS processes (slow studies are left out: pytest -m slow)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

format: $(INSTALLED) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED) ## Build the source archive and the wheel into dist/
	$(BIN)/python -m hatchling build

clean: ## Remove what builds and checks wrote; .venv and results stay
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf $(VENV)

# Installed again when the dependencies change.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): about 6 GB on Linux (torch with CUDA), once."
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# mmdet pulls OpenCV with windows (which needs libGL) and without. Both write the same files, and the last one
	@# installed wins: this one runs on servers and in containers too.
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
		--force-reinstall --no-deps opencv-python-headless
	@touch $@

$(BIN)/python:
	@chosen=; seen=; \
	for python in $(CANDIDATES); do \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		case "$$version" in \
			3.10|3.11|3.12|3.13) ;; \
			*) seen="$$seen\n  $$python is Python $$version"; continue ;; \
		esac; \
		if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
			seen="$$seen\n  $$python is Python $$version, but lacks its venv module (Debian, Ubuntu: apt install python$$version-venv)"; \
			continue; \
		fi; \
		chosen=$$python; break; \
	done; \
	if [ -z "$$chosen" ]; then \
		printf "clipbench needs Python 3.10, 3.11, 3.12 or 3.13 with its venv module. Tried: $(CANDIDATES).$$seen\n" >&2; \
		printf "Install one of them, or name it: make PYTHON=/path/to/python3.12 ...\n" >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$chosen"; \
	"$$chosen" -m venv $(VENV)
