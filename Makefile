# make          lint and test
# make install  the environment in .venv; what else the demo and developers need comes with their targets
# make demo     train and draw on the embedded demo model, offline, without a GPU
# make proof    prove that training teaches the style, and that a broken program would fail
# make test     the test suite, in two processes
# make test-gpu  the tests that need a GPU
# make test-colab  the test suite with the package versions that Google Colab has, in .venv-colab
# make torture  a hundred kills and thousands of broken inputs, about half an hour

PYTHON ?= python3
RUN := .venv/bin/python
export TRANSFORMERS_VERBOSITY := error

.PHONY: check install demo proof test test-gpu test-colab torture lint format clean

check: lint test

install: .venv/installed

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt -c constraints.txt
	@touch $@

.venv/installed-demo: .venv/installed
	$(RUN) -m pip install --quiet scikit-image -c constraints.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: .venv/installed-demo
	$(RUN) main.py --mode train --config demo/config.yaml
	$(RUN) main.py --mode inference --config demo/config.yaml
	$(RUN) -m demo.story

proof: .venv/installed-demo
	$(RUN) -m demo.proof

test: .venv/installed-dev
	$(RUN) -m pytest -n 2 --dist worksteal

test-gpu: .venv/installed-dev
	TEST_GPU=1 $(RUN) -m pytest -m gpu

test-colab: .venv-colab/installed
	.venv-colab/bin/python -m pytest -n 2 --dist worksteal

.venv-colab/installed: requirements.txt requirements-dev.txt constraints-colab.txt
	test -x .venv-colab/bin/python || $(PYTHON) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --quiet -r requirements-dev.txt -c constraints-colab.txt
	@touch $@

torture: .venv/installed-dev
	KILLS=100 EXAMPLES=3000 $(RUN) -m pytest tests/test_nothing_lost.py tests/test_properties.py

lint: .venv/installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	.venv/bin/lint-imports --no-cache --no-logo

format: .venv/installed-dev
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:
	rm -rf .venv .venv-colab demo/output
