ALGORITHM ?= mocov3
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env env-operators env-dev demo demo-detection test lint docs clean

help:
	@echo 'make demo    pretrain and evaluate at toy scale (ALGORITHM=$(ALGORITHM), DEMO_ARGS=...)'
	@echo 'make demo-detection   then train a detector on each of the frozen backbones'
	@echo 'make test    lint, fast tests, slow tests'
	@echo 'make lint    style, format, types and documentation only'
	@echo 'make docs    the site, into work_dirs/docs'
	@echo 'make env-operators    add the compiled operators of mmcv, which detection needs, to .venv'
	@echo 'make clean   remove caches and build products; .venv and work_dirs stay'
	@echo 'Each of them makes or updates .venv as far as it needs: make test and make demo-detection'
	@echo 'with the operators (a C++ compiler, 8 minutes on 2 cores), the others without.'

env:
	@tools/setup_env.sh

env-operators:
	@tools/setup_env.sh --operators

env-dev:
	@tools/setup_env.sh --dev

demo: env
	.venv/bin/python tools/demo.py --algorithm $(ALGORITHM) $(DEMO_ARGS)

# Needs the checkpoints of `make demo`, and says so.
demo-detection: env-operators
	.venv/bin/python tools/demo_detection.py --algorithm $(ALGORITHM) $(DEMO_ARGS)

lint: env-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m mypy
	@$(MAKE) --no-print-directory docs

docs: env-dev
	.venv/bin/python -m sphinx -W --keep-going -q docs work_dirs/docs

# Two tests at a time, of one thread each; those of one file run in one process, for their fixtures.
pytest = OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile

# Exit status 5 means that no test was selected: no slow tests is no failure.
test: env-operators lint
	$(pytest) -m 'not slow'
	$(pytest) -m slow || [ $$? -eq 5 ]

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
