# make demo         streams an answer of a real model to the terminal
# make test         runs all checks, and the tests that take a few minutes
# make test-slow    runs the tests that take minutes each, and those that need older libraries
# make lint         runs the checks only
# make bench        compares lmbridge with other clients; ROUNDS=3 ONLY=stream is quick, WRITE=yes updates the docs
# make swaps        compares requests for two models, at servers that hold one, with openai-python; ROUNDS, WRITE as above
# make nodes-bench  compares conversations on two servers: at the server with the cache, or at the least loaded one
# make fleet-bench  compares many agent runs on one real server with openai-agents; ROUNDS, WRITE as above
# make agents       compares agent runs with openai-agents and pydantic-ai; ROUNDS, WRITE as above
# make solved       counts the tasks that agents solve with a model that makes the mistakes of small models
# make mcp-bench    compares calls of MCP tools with the official SDK; ROUNDS, WRITE as above
# make gateway-bench  compares programs with and without the gateway, and the gateway with other proxies; as above
# make conformance  runs the official MCP conformance suite against client and server; it needs npm
# make clean        removes everything that these commands have created
#
# Each command except `clean` creates a virtual environment and installs what it needs, once. `lint` and `test-slow` share
# the environment of `test`, and `conformance` that of `mcp-bench`. The first suitable Python of the list below is used; to
# use another one, run `make clean`, and then for example `make PYTHON=/path/to/python3.12 test`.

.PHONY: help demo test test-slow lint bench swaps fleet-bench nodes-bench agents solved mcp-bench gateway-bench conformance clean
.DELETE_ON_ERROR:

NPM := tests/mcp/npm
CLIENTS := tests/gateway/npm
SUITE := tests/mcp/conformance

# The first pip that installs the dependency groups of pyproject.toml. The one that comes with Python may be older.
PIP_REQUIREMENT := 'pip>=25.1'

# A worker gets tests that follow each other, so that most fixtures of a session are created once, and takes others over
# when it has finished its own.
IN_PARALLEL := -n auto --dist worksteal

FIT := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))

ifndef PYTHON
PYTHON := $(shell for each in python3.13 python3.12 python3.11 python3; do \
	if $$each -c '$(FIT)' 2>/dev/null; then echo $$each; break; fi; done)
endif

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: .venv-demo/installed
	@.venv-demo/bin/python examples/quickstart.py

test: lint $(NPM)/node_modules/.package-lock.json
	.venv-test/bin/python -m pytest $(IN_PARALLEL) -m 'not slow'

test-slow: .venv-test/installed $(NPM)/node_modules/.package-lock.json $(CLIENTS)/node_modules/.package-lock.json
	.venv-test/bin/nox --session aioresponses oldest mcp1 clients
	.venv-test/bin/python -m pytest $(IN_PARALLEL) -m slow

# The checks run side by side, and the output of each is printed when it has ended, if make can do that.
lint: .venv-test/installed
	@$(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(CHECKS)

# pyright takes longest. It looks for libraries in the environment whose `python` is the first one.
CHECKS := check-pyright check-mypy check-style check-public-types
.PHONY: $(CHECKS)
check-pyright check-public-types: export PATH := $(CURDIR)/.venv-test/bin:$(PATH)

check-pyright:
	.venv-test/bin/pyright

check-mypy:
	.venv-test/bin/mypy

check-style:
	.venv-test/bin/ruff check
	.venv-test/bin/ruff format --check
	.venv-test/bin/python scripts/generate_sync.py --check

# It fails unless every public name has a declared type.
check-public-types:
	@echo 'pyright --verifytypes lmbridge --ignoreexternal'; \
		report=$$(.venv-test/bin/pyright --verifytypes lmbridge --ignoreexternal) || { echo "$$report"; exit 1; }; \
		echo "$$report" | grep 'Type completeness'

BENCH_OPTIONS = $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write)

bench: .venv-bench/installed
	@.venv-bench/bin/python -m benchmarks clients growth $(BENCH_OPTIONS)

swaps: .venv-swaps/installed
	@.venv-swaps/bin/python -m benchmarks model-swaps $(BENCH_OPTIONS)

nodes-bench: .venv-swaps/installed
	@.venv-swaps/bin/python -m benchmarks nodes $(BENCH_OPTIONS)

fleet-bench: .venv-fleet/installed
	@.venv-fleet/bin/python -m benchmarks fleet $(BENCH_OPTIONS)

agents: .venv-agents/installed
	@.venv-agents/bin/python -m benchmarks agents $(BENCH_OPTIONS)

solved: .venv-solved/installed
	@.venv-solved/bin/python -m benchmarks solving $(BENCH_OPTIONS)

mcp-bench: .venv-mcp/installed $(NPM)/node_modules/.package-lock.json
	@.venv-mcp/bin/python -m benchmarks mcp-calls $(BENCH_OPTIONS)

gateway-bench: .venv-gateway/installed
	@.venv-gateway/bin/python -m benchmarks gateway-swaps gateway-cost $(BENCH_OPTIONS)

conformance: .venv-mcp/installed $(SUITE)/node_modules/.package-lock.json
	@.venv-mcp/bin/python -m tests.mcp.conformance.run

clean:
	rm -rf $(NPM)/node_modules $(CLIENTS)/node_modules $(SUITE)/node_modules .venv-demo .venv-test .venv-bench .venv-swaps .venv-fleet .venv-agents .venv-solved .venv-mcp .venv-gateway dist site .nox .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# MCP servers and a client that the tests run, in the versions of the lock files. Without npm, those tests are skipped.
$(NPM)/node_modules/.package-lock.json: $(NPM)/package-lock.json
$(CLIENTS)/node_modules/.package-lock.json: $(CLIENTS)/package-lock.json
$(NPM)/node_modules/.package-lock.json $(CLIENTS)/node_modules/.package-lock.json:
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(<D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "npm was not found: the tests of programs from npm will be skipped" >&2; fi

# The conformance suite, and a version of Node that is new enough for it, if npm has one for this machine.
$(SUITE)/node_modules/.package-lock.json: $(SUITE)/package-lock.json
	@npm ci --prefix $(SUITE) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@

# The package is installed as editable, so that an environment is out of date only if pyproject.toml has changed.
.venv-demo/installed: EXTRAS := local
.venv-test/installed: EXTRAS := gateway,local,mcp
.venv-test/installed: ALSO := --group dev
.venv-bench/installed: ALSO := --group bench
.venv-fleet/installed: EXTRAS := local
.venv-fleet/installed: ALSO := -r benchmarks/fleet.txt
.venv-fleet/installed: benchmarks/fleet.txt
.venv-swaps/installed: EXTRAS := local
.venv-swaps/installed: ALSO := -r benchmarks/swaps.txt
.venv-swaps/installed: benchmarks/swaps.txt
.venv-agents/installed: ALSO := -r benchmarks/agents.txt
.venv-agents/installed: benchmarks/agents.txt
.venv-solved/installed: ALSO := -r benchmarks/solving.txt
.venv-solved/installed: benchmarks/solving.txt
.venv-mcp/installed: EXTRAS := mcp
.venv-mcp/installed: ALSO := -r benchmarks/mcp.txt
.venv-mcp/installed: benchmarks/mcp.txt
.venv-gateway/installed: EXTRAS := gateway,local
.venv-gateway/installed: ALSO := -r benchmarks/gateway.txt
.venv-gateway/installed: benchmarks/gateway.txt
.venv-demo/installed .venv-test/installed .venv-bench/installed .venv-swaps/installed .venv-fleet/installed .venv-agents/installed .venv-solved/installed .venv-mcp/installed .venv-gateway/installed: pyproject.toml
	@$(or $(PYTHON),false) -c '$(FIT)' 2>/dev/null || { \
		echo "lmbridge needs Python 3.11 or newer with its venv module, but $(if $(PYTHON),$(PYTHON) is not suitable,none was found)."; \
		echo "On Debian and Ubuntu: apt install python3 python3-venv"; \
		echo "Elsewhere: https://www.python.org/downloads/, or make PYTHON=/path/to/python3.11"; \
		exit 1; } >&2
	@echo "installing lmbridge$(if $(EXTRAS),[$(EXTRAS)]) into $(@D), once"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_REQUIREMENT)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -e '.$(if $(EXTRAS),[$(EXTRAS)])' $(ALSO)
	@touch $@
