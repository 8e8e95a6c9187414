ALGORITHM ?= mocov3
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env demo demo-detection test lint clean

help:
	@echo 'make demo    pretrain and evaluate at toy scale (ALGORITHM=$(ALGORITHM), DEMO_ARGS=...)'
	@echo 'make demo-detection   then train a detector on each of the frozen backbones'
	@echo 'make test    lint, fast tests, slow tests'
	@echo 'make lint    style and format only'
	@echo 'make clean   remove caches and build products; .venv and work_dirs stay'
	@echo 'Each of the first three makes or updates .venv when needed.'

env:
	@tools/setup_env.sh

demo: env
	.venv/bin/python tools/demo.py --algorithm $(ALGORITHM) $(DEMO_ARGS)

# Needs the checkpoints of `make demo`, and says so.
demo-detection: env
	.venv/bin/python tools/demo_detection.py --algorithm $(ALGORITHM) $(DEMO_ARGS)

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Exit status 5 means that no test was selected: no slow tests is no failure.
test: lint
	.venv/bin/python -m pytest -m 'not slow'
	.venv/bin/python -m pytest -m slow || [ $$? -eq 5 ]

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
