# `make demo` sets up and runs the main job on the embedded tiny checkpoint; `make test` sets up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

.PHONY: demo test clean

demo: $(STAMP)
	$(VENV)/bin/harness doctor
	$(VENV)/bin/harness gate

test: $(STAMP)
	$(VENV)/bin/python -m pytest tests

# torch is pinned to the newest release that the converter is validated with.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[coreai,test]'
	touch $@

clean:
	rm -rf $(VENV) build
