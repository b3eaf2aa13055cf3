# The only entry point. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tokenfactory
PYTHON ?= python3
LOCK := $(shell sha256sum requirements.lock | cut -c1-12)
VENV ?= $(CACHE)/venv-$(LOCK)
PY := $(VENV)/bin/python
export PYTHONPATH := $(CURDIR)/operator$(if $(PYTHONPATH),:$(PYTHONPATH))
export PATH := $(VENV)/bin:$(PATH)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

# A venv is complete when its marker exists: an interrupted install is simply begun again.
$(VENV)/.complete: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Token Factory needs Python 3.11 or later; PYTHON=/path/to/python3.11 make … picks one" >&2; exit 1; }
	@mkdir -p $(CACHE); exec 9>$(CACHE)/venv.lock; flock 9; [ -e $@ ] && { touch $@; exit 0; }; \
	  echo "installing Python packages into $(VENV) (about a minute, once per lock file)"; \
	  rm -rf $(VENV); $(PYTHON) -m venv $(VENV); \
	  $(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements.lock; touch $@

.PHONY: venv
venv: $(VENV)/.complete ## the Python environment, from the lock file

.PHONY: lock
lock: ## resolve pyproject.toml anew into requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
	  --no-header --python-version 3.11 --group dev pyproject.toml -o requirements.lock

.PHONY: lint
lint: venv ## ruff: rules and format
	ruff check .
	ruff format --check .

.PHONY: types
types: venv ## mypy --strict
	mypy

.PHONY: layers
layers: venv ## import-linter: the layers of DESIGN
	lint-imports --no-logo

.PHONY: format
format: venv ## let ruff rewrite what it can
	ruff check --fix .
	ruff format .

.PHONY: crds
crds: venv ## write crds/ and the chart's copy from the types in api/
	$(PY) -m tokenfactory.api.crd

.PHONY: drift
drift: venv ## generated files are what their sources say
	$(PY) -m tokenfactory.api.crd --check

.PHONY: test-fast
test-fast: venv ## unit tests without a cluster, under a minute
	$(PY) -m pytest -q -n 2 tests/unit -m "not slow and not cluster and not node"

# What pytest runs may be narrowed: make test T=tests/cluster/test_thread.py runs just that, in one process. All of it
# is shared among WORKERS: about half of the suite's time is waiting for clusters. WORKERS=0 is one after the other.
T ?= tests
WORKERS ?= 3
.PHONY: test
test: tools ## all tests; builds the embedded control plane once (about 10 minutes) [T= WORKERS=]
	$(PY) -m pytest $(if $(filter tests,$(T)),-n $(WORKERS) --durations=15 )$(T)

STEPS ?= 1000000
SEED ?= 1
.PHONY: fault
fault: venv ## the fault search over ledger and governor: a million steps, some minutes [STEPS= SEED=]
	PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(PY) -m tests.fault.search --steps $(STEPS) --seed $(SEED)

.PHONY: model
model: venv ## every history of small sites, exhaustively, and each deliberate bug's shortest trace
	PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(PY) -m tests.fault.model

SITES ?= 5
WALKS ?= 8
POINTS ?= 0
.PHONY: crash
crash: tools ## operators killed at every write on real control planes, and random walks [SEED= POINTS= WALKS= SITES= ONLY=]
	PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(PY) -m tests.cluster.scenarios.crash_search --seed $(SEED) --points $(POINTS) \
	  --walks $(WALKS) --workers $(SITES) $(if $(ONLY),--only $(ONLY))

.PHONY: bench
bench: venv ## one benchmark: make bench B=market [QUICK=1] (B=scale: NODES=)
	@[ -n "$(B)" ] || { echo "make bench B=NAME, one of: $$(cd benchmarks && ls [a-z]*.py | sed 's/\.py//' | xargs)" >&2; exit 2; }
	QUICK=$(QUICK) $(PY) benchmarks/$(B).py

.PHONY: tools
tools: venv ## find or build the control plane, helm, kubeconform and promtool (once, about 10 minutes)
	$(PY) -m tokenfactory.cli cluster tools

SCENARIO ?= story
.PHONY: demo
demo: venv ## a running factory on simulated GPU nodes; SCENARIO=smoke ends by itself
	$(PY) -m tokenfactory.cli demo --scenario $(SCENARIO)

.PHONY: cluster
cluster: venv ## a real control plane on this machine with our CRDs; says how to use it
	$(PY) -m tokenfactory.cli cluster up $(if $(wildcard crds/*.yaml),--apply crds)

.PHONY: cluster-down
cluster-down: venv ## end that control plane
	$(PY) -m tokenfactory.cli cluster down

.PHONY: proto
proto: venv ## generate agent/podresources and the node tests' device plugin from their .proto
	$(PY) -m grpc_tools.protoc -I operator --python_out=operator --pyi_out=operator \
	  operator/tokenfactory/agent/podresources/podresources.proto
	@$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. tests/node/deviceplugin/deviceplugin.proto

.PHONY: gpu-check
gpu-check: venv ## what a real GPU answers to everything the agent asks (reads only)
	$(PY) -m tokenfactory.agent.gpucheck

.PHONY: ci
ci: venv ## all that must hold before anything lands; ends with pytest's own words
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint types layers drift
	@$(MAKE) --no-print-directory test
