# make demo    the shipped recording through the node: numbers, a report and a cloud in results/latest/
# make test    all tests
# make env     only the environment, in .venv/ (the two above make it when it is missing)
# make bench   how long the stages around the model take
# make train-smoke   every step from a recording to a node that answers with what was learnt, for a few moments each
# make edge-llm      the environment of TensorRT Edge-LLM's exporter, in .venv-edge-llm/ (its tests run where it is)
# make lint    ruff
# make clean   removes the environment, results and build products

PYTHON ?= python3
VENV ?= .venv
# Installed first and alone, so that what follows accepts the build that is there. These are arguments of pip: the index
# with PyTorch's CPU builds, gigabytes smaller than the default ones, fits in here too.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
RESULTS ?= results/latest

comma := ,

# A sourced ROS 2 is used as it is; otherwise ROS comes from PyPI into the environment, and what another environment's
# ROS has left in the variables stays outside (the wheels restart Python once, guarded by the first of them).
ifeq ($(ROS_VERSION),2)
ROS := sourced
OTHER_ROS := wheels
VENV_ARGS := --system-site-packages
EXTRAS := test
else
ROS := wheels
OTHER_ROS := sourced
VENV_ARGS :=
EXTRAS := test,ros
ifdef _ROS_WHEELS_BOOTSTRAP_COMPLETE
unexport LD_LIBRARY_PATH
endif
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE PYTHONPATH AMENT_PREFIX_PATH COLCON_PREFIX_PATH
endif
unexport PYTHONHOME

# rclpy does not start where neither HOME nor this is set.
export ROS_LOG_DIR ?= $(abspath $(VENV))/ros_log
export HF_HUB_OFFLINE := 1

READY := $(VENV)/.ready-$(ROS)

# $(1) environment, $(2) what is said, $(3) pip's arguments. Its output is shown only when it fails.
pip_into = echo "  $(2)"; $(1)/bin/python -m pip install --quiet --no-input --disable-pip-version-check $(3) \
	> $(1)/pip.log 2>&1 || { cat $(1)/pip.log >&2; echo "make: pip could not install $(2); the lines above say why" >&2; exit 1; }
pip_install = $(call pip_into,$(VENV),$(1),$(2))

.DEFAULT_GOAL := help
.PHONY: help demo test bench train-smoke env edge-llm lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(READY)
	@$(VENV)/bin/python -m depthlm_ros.cli replay models/sample_drive --out $(RESULTS)

test: $(READY)
	@ROS_PYTHON_CHECK_FIELDS=1 $(VENV)/bin/python -m pytest -p no:cacheprovider $(PYTEST_ARGS)

bench: $(READY)
	@$(VENV)/bin/python -m pytest -p no:cacheprovider tests/bench_stages.py --benchmark-columns=min,median,stddev

train-smoke: $(READY)
	@$(VENV)/bin/python -m depthlm_training.smoke

env: $(READY)

# The exporter pins versions that clash with ours, so it has an environment of its own. It runs on a CPU.
EDGE_LLM := .venv-edge-llm
edge-llm: $(EDGE_LLM)/.ready

$(EDGE_LLM)/.ready: config/edge_llm_requirements.txt
	@echo "Making the environment of Edge-LLM's exporter in $(EDGE_LLM)/ (once, 2 GB):"
	@rm -rf $(EDGE_LLM) && $(PYTHON) -m venv $(EDGE_LLM)
	@$(call pip_into,$(EDGE_LLM),$(TORCH),$(TORCH))
	@$(call pip_into,$(EDGE_LLM),the exporter,-r config/edge_llm_requirements.txt)
	@touch $@

lint: $(READY)
	@$(VENV)/bin/python -m ruff --version > /dev/null 2>&1 || { $(call pip_install,ruff,-e '.[lint]' --no-build-isolation); }
	@$(VENV)/bin/python -m ruff check .

$(READY): setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: Python 3.10 or newer is needed and \"$(PYTHON)\" is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment in $(VENV)/ (once; several minutes with a slow connection):"
	@$(PYTHON) -m venv $(if $(wildcard $(VENV)/.ready-$(OTHER_ROS)),--clear) $(VENV_ARGS) $(VENV)
	@rm -f $(VENV)/.ready-*
	@$(call pip_install,$(TORCH),$(TORCH))
	@$(call pip_install,build tools,'setuptools>=70.1$(comma)<80' wheel)
	@$(call pip_install,this package and what it needs,--no-build-isolation -e '.[$(EXTRAS)]')
	@$(VENV)/bin/python -c 'import rclpy' || { \
		echo "make: rclpy does not import with $$($(VENV)/bin/python -V). Name the Python of the sourced ROS 2" \
		     "(make PYTHON=...), or use a shell where ROS is not sourced." >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) $(EDGE_LLM) results build install log *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
