PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/requirements
	$(RUN) example_rank_sweep.py

test: $(VENV)/requirements-dev
	$(RUN) -m pytest

lint: $(VENV)/requirements-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) demo_rank_sweep_results

# The file $(VENV)/NAME says that NAME.txt is installed there.
$(VENV)/%: %.txt constraints.txt requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	touch $@
