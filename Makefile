# Every target sets up what it needs. `make demo` and `make test` work on a fresh machine with Python 3.10 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow soak lint resolve docs baselines bench clean

$(VENV)/.core: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.core  ## learn to swing up a pendulum from an expert, by differentiating through the planner
	$(BIN)/difftori train difftori-il --preset pendulum --env pendulum --seed 0 --epochs 120 --eval-every 5 --eval-episodes 500 --out runs/demo
	$(BIN)/difftori eval runs/demo --episodes 1000

test: $(VENV)/.dev  ## the default suite: CPU only, well under six minutes on two cores
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev  ## what takes minutes: compilation, long runs
	$(BIN)/python -m pytest -m slow --timeout 1800

soak: $(VENV)/.dev  ## the long tests of docs/reliability.md: kills of every trainer, full disks, memory, sweeps, the wheel
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --timeout 3600 tests/soak --found results/soak.csv

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

resolve:  ## check that the core and every extra resolve to wheels on Python 3.10 to 3.13
	$(PYTHON) -m venv $(VENV)/resolve && $(VENV)/resolve/bin/python -m pip install --quiet uv
	for python in 3.10 3.11 3.12 3.13; do for extra in '' dmc metaworld pusht robomimic data wandb ray slurm docs test dev; do \
	  $(VENV)/resolve/bin/uv pip compile --quiet --python-version $$python --python-platform x86_64-manylinux_2_28 --only-binary :all: \
	    --constraint constraints.txt pyproject.toml $${extra:+--extra $$extra} --output-file $(VENV)/resolve/$$python-$$extra.txt \
	    && echo "Python $$python, $${extra:-core}: $$(grep -E '^(torch|numpy)==' $(VENV)/resolve/$$python-$$extra.txt | paste -sd' ')" || exit 1; \
	done; done

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# Theseus asks for pins that no longer resolve and for build tools at run time: hence no dependencies and no isolation.
baselines: $(VENV)/.dev  ## Theseus 0.2.3, mpc.pytorch 0.0.6 and CasADi 3.8.2, to compare with
	$(PIP) 'setuptools<81' wheel
	$(PIP) -r constraints-baselines.txt --no-build-isolation --no-deps
	$(BIN)/python -m pytest -m baselines

bench: baselines
	$(BIN)/difftori bench solver
	$(BIN)/difftori bench control

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis
