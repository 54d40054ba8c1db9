# `make demo` sets up and runs the main job on the embedded tiny checkpoint; `make test` sets up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
OLDER := $(VENV)/transformers-4.57
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

demo: $(STAMP)
	$(VENV)/bin/harness doctor
	$(VENV)/bin/harness gate

# The oracle must read both generations of transformers; only the oracle imports its models.
test: $(STAMP) $(OLDER)/.installed
	$(VENV)/bin/python -m pytest tests
	PYTHONPATH=$(OLDER) $(VENV)/bin/python -m pytest tests/test_oracle.py tests/test_hooks.py \
		tests/test_contract.py tests/test_streaming.py tests/test_drafting.py

# torch is pinned to the newest release that the converter is validated with.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[coreai,test]'
	touch $@

$(OLDER)/.installed: $(STAMP)
	$(PIP) --target $(OLDER) --no-deps transformers==4.57.1 huggingface_hub==0.36.0 tokenizers==0.22.1 requests urllib3 \
		certifi charset-normalizer idna
	touch $@

clean:
	rm -rf $(VENV) build
