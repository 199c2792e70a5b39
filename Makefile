# Every target sets up what it needs. `make demo` and `make test` work on a fresh machine with Python 3.10 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VULKAN := $(VENV)/vulkan
# Packages of Debian 12 and its backports: SHA-256=path.
LAVAPIPE := \
  3899f1800424c60a05df5d6913076a526ca8fdbabec43672cd397563d1ca3263=m/mesa/mesa-vulkan-drivers_25.0.7-2~bpo12+1_amd64.deb \
  622f28b807ba55a1f5ad1622ff83aa2c5b11fedbec074850e04c10a8f28b43d3=v/vulkan-loader/libvulkan1_1.3.239.0-1_amd64.deb \
  9f0751109ba89e65b1313a4f3e34a29977a0db6fa30ed475e2c6bd555fa9e866=l/llvm-toolchain-15/libllvm15_15.0.6-4+b1_amd64.deb
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-suites vulkan soak gpu-check lint resolve docs tutorials baselines bench clean

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.core  ## learn to swing up a pendulum from an expert, by differentiating through the planner
	$(BIN)/difftori demo

test: $(VENV)/.dev  ## the default suite: CPU only, some fourteen minutes on two cores
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev  ## what takes minutes: compilation, long runs
	$(BIN)/python -m pytest -m slow --timeout 1800

$(VENV)/.suites: $(VENV)/.dev
	$(PIP) -c constraints.txt -e '.[robomimic,maniskill]'
	touch $@

test-suites: $(VENV)/.suites $(VULKAN)/activate  ## the environments robomimic (needs gcc) and maniskill (Python 3.10 or 3.11)
	. $(VULKAN)/activate && $(BIN)/python -m pytest -k 'robomimic or maniskill or render or manipulation or every_environment' tests/envs tests/data tests/collection tests/experiments

vulkan: $(VULKAN)/activate  ## Mesa's Vulkan driver for ManiSkill, which needs no GPU and no root; Debian 12 and relatives
$(VULKAN)/activate:
	mkdir -p $(VULKAN)/root
	for deb in $(LAVAPIPE); do \
	  file=$(VULKAN)/package.deb; curl -fsSL --retry 3 -o $$file https://deb.debian.org/debian/pool/main/$${deb#*=} \
	    && echo "$${deb%%=*}  $$file" | sha256sum --check --quiet && dpkg -x $$file $(VULKAN)/root && rm $$file || exit 1; \
	done
	echo 'export VK_ICD_FILENAMES=$(abspath $(VULKAN))/root/usr/share/vulkan/icd.d/lvp_icd.json' > $@.tmp
	echo 'export LD_LIBRARY_PATH=$(abspath $(VULKAN))/root/usr/lib/x86_64-linux-gnu$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}' >> $@.tmp
	mv $@.tmp $@

soak: $(VENV)/.dev  ## the long tests of docs/reliability.md: kills of every trainer, full disks, memory, sweeps, the wheel
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --timeout 3600 tests/soak --found results/soak.csv

gpu-check: $(VENV)/.dev  ## on a CUDA device, eight minutes: tests, speed, and learning from pixels, into results/gpu
	$(BIN)/difftori bench gpu-check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

resolve:  ## check that the core and every extra resolve to wheels on Python 3.10 to 3.13
	$(PYTHON) -m venv $(VENV)/resolve && $(VENV)/resolve/bin/python -m pip install --quiet uv
	for python in 3.10 3.11 3.12 3.13; do for extra in '' dmc metaworld pusht robomimic maniskill data wandb hub ray slurm serve onnx docs test dev; do \
	  $(VENV)/resolve/bin/uv pip compile --quiet --python-version $$python --python-platform x86_64-manylinux_2_28 --only-binary :all: \
	    --constraint constraints.txt pyproject.toml $${extra:+--extra $$extra} --output-file $(VENV)/resolve/$$python-$$extra.txt \
	    && echo "Python $$python, $${extra:-core}: $$(grep -E '^(torch|numpy)==' $(VENV)/resolve/$$python-$$extra.txt | paste -sd' ')" || exit 1; \
	done; done

tutorials: $(VENV)/.dev  ## execute the tutorials and write their notebooks; some ten minutes
	for file in docs/tutorials/*.py; do $(BIN)/python -m tests.support.notebooks $$file || exit 1; done

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
