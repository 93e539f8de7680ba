PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-faults test-ray test-gpu gpu lint pictures clean

demo: $(VENV)/requirements
	$(RUN) example_rank_sweep.py

test: $(VENV)/requirements-dev
	$(RUN) -m pytest -n 2 --dist loadfile

# The same faults as in make test, but twenty kills where that does three.
test-faults: $(VENV)/requirements-dev
	KS_TEST_KILLS=20 $(RUN) -m pytest tests/test_survival.py

# A Ray cluster of two nodes on this machine, in a network of its own with loopback alone: two minutes; Linux with
# unshare (util-linux) and ip (iproute2).
test-ray: $(VENV)/requirements-dev $(VENV)/requirements-ray
	unshare --map-root-user --net sh -c 'ip link set lo up && exec $(RUN) -m pytest -m ray'

# On a machine with a CUDA device, with a torch that was installed for it (make test does not need one).
test-gpu:
	$(PYTHON) -m pytest -m gpu

# All that is measured on a card, unattended, and its table and picture; three hours at most, and again goes on.
gpu:
	$(PYTHON) benchmarks/card.py --output_dir build/gpu

lint: $(VENV)/requirements-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The pictures of README.
pictures: demo
	mkdir -p docs
	$(RUN) plot_rank_results.py --results_dir demo_rank_sweep_results --log_scale --dpi 75 --output_dir build/pictures \
	    --title "Demo: 1024 × 2048, singular values 1/k, 4 × 4 grid"
	cp build/pictures/rank_sweep_loss_curves.png docs/demo_loss_curves.png
	cp build/pictures/rank_sweep_floor.png docs/demo_floor.png

clean:
	rm -rf $(VENV) demo_rank_sweep_results

# The file $(VENV)/NAME says that NAME.txt is installed there.
$(VENV)/%: %.txt constraints.txt requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	touch $@
