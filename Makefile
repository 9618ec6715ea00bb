# Lloom: `make demo` runs a small network on this machine, `make test` its tests. Needs git, make, python3 with venv, libgomp1.
# Everything is installed into .venv inside the checkout; `make clean` removes it.

PYTHON ?= python3
ARGS ?=
# Test files at once in `make test`: they wait more than they work. 0 is one process, for a debugger.
JOBS ?= 3

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
# A shell's active environment and its PYTHONPATH must not leak into .venv.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --no-deps --require-hashes
DAEMON_SOURCES := $(shell find daemon/cmd daemon/internal daemon/go.mod daemon/go.sum -type f ! -name '*_test.go' 2>/dev/null)
GO := $(CURDIR)/tools/go.sh
# Only folders that exist: pytest refuses a missing one.
TEST_FOLDERS := $(wildcard tests/unit tests/properties tests/golden tests/contract tests/integration)

# Prints how long a target took, under the runner's own closing line, and keeps its exit status.
define timed
@began=$$(date +%s); $(1); status=$$?; echo "make $@: $$(($$(date +%s) - began)) s"; exit $$status
endef

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo "ARGS=... goes to the program behind demo, test, test-system, soak and lock: make test ARGS='-k stream -x'"

.venv/.venv-made:
	@tools/check_prerequisites.sh $(PYTHON)
	@tools/step.sh "Creating .venv" $(PYTHON) -m venv --clear .venv
	@touch $@

# p2pd compiles while pip installs. Without a new Go on PATH, tools/go.sh first puts PyPI's into .venv.
.venv/.installed: .venv/.venv-made requirements.lock pyproject.toml hatch_build.py lloom_sidecar/__init__.py $(DAEMON_SOURCES)
	@$(GO) --find >/dev/null
	@tools/step.sh "Compiling p2pd and installing the packages of requirements.lock" sh -c '\
		$(BIN)/python hatch_build.py & compile=$$!; \
		$(PIP_INSTALL) --no-compile -r requirements.lock & install=$$!; \
		trap "kill $$compile $$install 2>/dev/null; exit 143" TERM; \
		wait $$install; installed=$$?; wait $$compile && exit $$installed'
	@tools/step.sh "Installing this checkout" $(BIN)/python -m pip install --quiet --no-input --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.lock
	@tools/step.sh "Installing the packages of requirements-dev.lock" $(PIP_INSTALL) --no-compile -r requirements-dev.lock
	@touch $@

.PHONY: install install-dev
install: .venv/.installed ## Install into .venv what a node needs
install-dev: .venv/.installed-dev ## Install into .venv what tests and linters need

.PHONY: demo
demo: .venv/.installed ## Run a small network on this machine until Ctrl-C (ARGS=--once: one question, then end)
	@exec $(BIN)/lloom-sidecar demo $(ARGS)

.PHONY: test
test: .venv/.installed-dev ## Unit, property, golden, contract and integration tests (no root, no containers)
	$(call timed,$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TEST_FOLDERS) $(ARGS))

.PHONY: test-system
test-system: .venv/.installed-dev ## Go's race tests, namespaces, compose, chaos, browser (root)
	@command -v $${CC:-gcc} >/dev/null || { echo "make: Go's race detector needs a C compiler: install gcc (Debian, Ubuntu: apt-get install gcc libc6-dev)." >&2; exit 1; }
	$(call timed,(cd daemon && CGO_ENABLED=1 $(GO) test -race ./...) && $(BIN)/python -m pytest tests/system -m "not soak" $(ARGS))

.PHONY: soak
soak: .venv/.installed-dev ## The long fault scenarios: partitions, floods, skewed clocks, chaos (root)
	$(call timed,$(BIN)/python -m pytest tests/system -m soak -s $(ARGS))

.PHONY: test-kubernetes
test-kubernetes: .venv/.installed-dev ## The chart on a real one-node cluster (root; ten minutes the first time)
	@bash tests/system/engine/install.sh && bash tests/kubernetes/kubernetes_cluster/install.sh
	$(call timed,$(BIN)/python -m pytest tests/kubernetes -s $(ARGS))

.PHONY: scale
scale: .venv/.installed-dev ## Measure a network of 40 real nodes (minutes, every core); ARGS="--executors 20 --clients 18 --json FILE"
	$(call timed,$(BIN)/python -m tests.scale $(ARGS))

PYTHON_SOURCES := $(wildcard lloom_sidecar tests tools hatch_build.py)
GO_FOLDERS := $(wildcard daemon/cmd daemon/internal)

.PHONY: lint
lint: .venv/.installed-dev ## ruff, mypy, gofmt, go vet
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	@unformatted=$$($(GO) gofmt -l $(GO_FOLDERS)); [ -z "$$unformatted" ] || { echo "make lint: gofmt would change $$unformatted; run 'make lint-fix'." >&2; exit 1; }
	cd daemon && $(GO) vet ./...

.PHONY: lint-fix
lint-fix: .venv/.installed-dev ## Let ruff and gofmt repair what they can
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(GO) gofmt -w $(GO_FOLDERS)

.venv/.installed-fuzz: .venv/.installed-dev tests/fuzz/requirements.lock
	@tools/step.sh "Installing the fuzzer" $(PIP_INSTALL) --target .venv/fuzz --upgrade -r tests/fuzz/requirements.lock
	@touch $@

.PHONY: fuzz
fuzz: .venv/.installed-fuzz ## Coverage-guided fuzzing of every parser, by hand (ARGS='sse frames --seconds 300')
	$(call timed,PYTHONPATH=.venv/fuzz $(BIN)/python -m tests.fuzz $(ARGS))

.PHONY: audit
audit: .venv/.installed ## Known vulnerabilities of all dependencies, by hand: it asks advisory services
	$(call timed,$(BIN)/python tools/audit.py)

.PHONY: coverage
coverage: .venv/.installed-dev ## Branch coverage of protocol/ and peers/ by their own tests, which has to be 100 %
	$(call timed,$(BIN)/python -m pytest -q tests/unit/test_protocol_*.py tests/unit/test_peers_*.py tests/properties tests/golden --cov=lloom_sidecar.protocol --cov=lloom_sidecar.peers --cov-report=term-missing --cov-fail-under=100 $(ARGS))

.PHONY: proto
proto: .venv/.installed-dev ## Generate lloom_sidecar/protocol/pb from the .proto files
	$(BIN)/python tools/generate_protobuf.py

.PHONY: docs
docs: .venv/.installed ## Generate docs/settings.md and docs/reference.md from the code
	$(BIN)/python tools/generate_docs.py

.PHONY: lock
lock: .venv/.venv-made ## Write the requirements*.lock files from pyproject.toml (ARGS=--upgrade: newest versions)
	tools/lock.sh $(ARGS)

.PHONY: clean
clean: ## Remove .venv, the compiled p2pd, caches and build results
	rm -rf .venv build dist lloom_sidecar/_bin .mypy_cache .pytest_cache .ruff_cache .hypothesis htmlcov .coverage .coverage.*
	find lloom_sidecar tests tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
