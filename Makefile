# make demo         streams an answer of a real model to the terminal
# make test         runs all checks, and the tests that take a few minutes
# make test-slow    runs the tests that take minutes each, and those that need older libraries
# make test-newer   runs the fast tests with Python 3.13, in a chroot of Debian 13; it needs root on Debian or Ubuntu.
#                   SUITE=sid takes Python 3.14 of Debian's newest packages, and SUITE=sid PYTHON=python3.15 another one
# make test-llama-server  runs the tests with real servers on Debian's own llama-server, in a chroot of sid; as above
# make fuzz         tries random and damaged inputs for a minute; MINUTES=10 takes longer, ONLY=schemas takes one kind of them
# make lint         runs the checks only
# make docs         serves the documentation as a site, at http://127.0.0.1:8000
# make bench        compares lmbridge with other clients; ROUNDS=3 ONLY=stream is quick, WRITE=yes updates the docs
# make swaps        compares requests for two models, at servers that hold one, with openai-python; ROUNDS, WRITE as above
# make nodes-bench  compares conversations on two servers: at the server with the cache, or at the least loaded one
# make fleet-bench  compares many agent runs on one real server with openai-agents; ROUNDS, WRITE as above
# make agents       compares agent runs with openai-agents and pydantic-ai; ROUNDS, WRITE as above
# make solved       counts the tasks that agents solve with a model that makes the mistakes of small models
# make solved-real  counts the tasks that agents solve with real small models; ONLY=smollm2 takes one of them, TINY=yes ten tasks
# make mcp-bench    compares calls of MCP tools with the official SDK; ROUNDS, WRITE as above
# make scale        simulates agent runs on 1, 10 and 100 servers, up to a million; TINY=yes takes seconds, WRITE as above
# make journal-cost  measures what a journal costs: steps a second, and bytes a round; TINY, WRITE as above
# make gateway-bench  compares programs with and without the gateway, and the gateway with other proxies; as above
# make conformance  runs the official MCP conformance suite against client and server; it needs npm
# make faults       breaks replies of every endpoint at every byte; STEP=31 takes every 31st, MINUTES=30 an even part, WRITE as above
# make cancel-sweep  cancels every public coroutine at every step; STEP=3 takes every third, ONLY=Agent some of them
# make load         has 1,000 streams, runs and requests through the gateway at a time, and 10,000 in the queue
# make soak         runs mixed traffic for 20 minutes while servers are killed; MINUTES=60 for longer, WRITE=yes as above
# make clean        removes everything that these commands have created
#
# Each command except `clean` creates a virtual environment and installs what it needs, once. `lint` and `test-slow` share
# the environment of `test`, `conformance` that of `mcp-bench`, `scale` and `journal-cost` that of `demo`. The first
# suitable Python of the list below is used; to use another one, run `make clean`, and then for example
# `make PYTHON=/path/to/python3.12 test`.

.PHONY: help demo test test-slow test-newer test-llama-server fuzz lint docs bench swaps fleet-bench nodes-bench agents solved solved-real mcp-bench scale journal-cost gateway-bench conformance faults cancel-sweep load soak clean
.DELETE_ON_ERROR:

# Tests start many interpreters and workers, which take longer if each has to compile the package and the tests again.
export PYTHONDONTWRITEBYTECODE :=

NPM := tests/mcp/npm
CLIENTS := tests/gateway/npm
CONFORMANCE := tests/mcp/conformance

# The first pip that installs the dependency groups of pyproject.toml. The one that comes with Python may be older.
PIP_REQUIREMENT := 'pip>=25.1'

# A worker gets tests that follow each other, so that most fixtures of a session are created once. When it has
# finished its own tests, it takes over some of another worker.
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
	.venv-test/bin/nox --session aioresponses oldest mcp1 clients dbos ray referee docs migrations dist api
	.venv-test/bin/python -m pytest $(IN_PARALLEL) -m slow --ignore=tests/fleet/test_ray.py

# PYTHON is passed on only if the command line sets it, because otherwise it is a Python of this machine.
test-newer:
	scripts/test_in_debian.sh $(or $(SUITE),trixie) $(if $(findstring command,$(origin PYTHON)),$(PYTHON))

test-llama-server:
	scripts/test_in_debian.sh --llama-server sid

fuzz: .venv-test/installed
	@.venv-test/bin/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY))

# The checks run side by side. If make has --output-sync, the output of each check is printed when it has ended.
lint: .venv-test/installed
	@$(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(CHECKS)

# pyright takes longest. It looks for libraries in the environment whose `python` comes first in PATH.
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

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve

BENCH_OPTIONS = $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write) $(if $(TINY),--tiny)

bench: .venv-bench/installed
	@.venv-bench/bin/python -m benchmarks clients growth steps $(BENCH_OPTIONS)

swaps: .venv-swaps/installed
	@.venv-swaps/bin/python -m benchmarks model-swaps $(BENCH_OPTIONS)

nodes-bench: .venv-swaps/installed
	@.venv-swaps/bin/python -m benchmarks nodes $(BENCH_OPTIONS)

fleet-bench: .venv-fleet/installed
	@.venv-fleet/bin/python -m benchmarks fleet $(BENCH_OPTIONS)

agents: .venv-agents/installed
	@.venv-agents/bin/python -m benchmarks agents $(BENCH_OPTIONS)

solved: .venv-solved/installed
	@.venv-solved/bin/python -m benchmarks solving long-tasks $(BENCH_OPTIONS)

# bfcl-eval is a megabyte of tasks, with hundreds of megabytes of dependencies that its own programs need.
solved-real: .venv-solved-real/installed
	@.venv-solved-real/bin/python -m pip install -qq --disable-pip-version-check --no-deps bfcl-eval==2026.3.23
	@.venv-solved-real/bin/python -m benchmarks solving-real schemas $(BENCH_OPTIONS)

mcp-bench: .venv-mcp/installed $(NPM)/node_modules/.package-lock.json
	@.venv-mcp/bin/python -m benchmarks mcp-calls $(BENCH_OPTIONS)

# It is plain Python, so the smallest environment is enough.
scale: .venv-demo/installed
	@.venv-demo/bin/python -m benchmarks.scale $(if $(WRITE),--write) $(if $(TINY),--tiny)

journal-cost: .venv-demo/installed
	@.venv-demo/bin/python -m benchmarks.journal_cost $(if $(WRITE),--write) $(if $(TINY),--tiny)

gateway-bench: .venv-gateway/installed
	@.venv-gateway/bin/python -m benchmarks gateway-swaps gateway-cost $(BENCH_OPTIONS)

conformance: .venv-mcp/installed $(CONFORMANCE)/node_modules/.package-lock.json
	@.venv-mcp/bin/python -m tests.mcp.conformance.run

# It takes two hours of one core.
faults: .venv-test/installed
	@.venv-test/bin/python -m tests.reliability.faults $(if $(STEP),--step $(STEP)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(WRITE),--write)

cancel-sweep: .venv-test/installed
	@.venv-test/bin/python -m tests.reliability.cancel_sweep $(if $(STEP),--step $(STEP)) $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write)

soak: .venv-test/installed
	@.venv-test/bin/python -m tests.reliability.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(WRITE),--write)

load: .venv-load/installed
	@.venv-load/bin/python -m benchmarks load $(BENCH_OPTIONS)

clean:
	rm -rf $(NPM)/node_modules $(CLIENTS)/node_modules $(CONFORMANCE)/node_modules .venv-demo .venv-test .venv-docs .venv-bench .venv-swaps .venv-fleet .venv-agents .venv-solved .venv-solved-real .venv-mcp .venv-gateway .venv-load .venv-trixie .venv-sid dist site .nox .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# MCP servers and a client that the tests run, in the versions of the lock files. Without npm, those tests are skipped.
$(NPM)/node_modules/.package-lock.json: $(NPM)/package-lock.json
$(CLIENTS)/node_modules/.package-lock.json: $(CLIENTS)/package-lock.json
$(NPM)/node_modules/.package-lock.json $(CLIENTS)/node_modules/.package-lock.json:
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(<D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "npm was not found: the tests of programs from npm will be skipped" >&2; fi

# The conformance suite, and a version of Node that is new enough for it, if npm has one for this machine.
$(CONFORMANCE)/node_modules/.package-lock.json: $(CONFORMANCE)/package-lock.json
	@npm ci --prefix $(CONFORMANCE) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@

# The package is installed as editable, so that an environment is out of date only if pyproject.toml has changed.
.venv-demo/installed: EXTRAS := local
.venv-test/installed: EXTRAS := cli,gateway,langchain,local,mcp,openai-agents,pydantic-ai,ray
.venv-test/installed: ALSO := --group dev
.venv-docs/installed: EXTRAS := otel
.venv-docs/installed: ALSO := --group docs
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
.venv-solved-real/installed: EXTRAS := local
.venv-solved-real/installed: ALSO := -r benchmarks/solving.txt -r benchmarks/solving-real.txt
.venv-solved-real/installed: benchmarks/solving.txt benchmarks/solving-real.txt
.venv-mcp/installed: EXTRAS := mcp
.venv-mcp/installed: ALSO := -r benchmarks/mcp.txt
.venv-mcp/installed: benchmarks/mcp.txt
.venv-gateway/installed: EXTRAS := gateway,local
.venv-gateway/installed: ALSO := -r benchmarks/gateway.txt
.venv-gateway/installed: benchmarks/gateway.txt
.venv-load/installed: EXTRAS := gateway
.venv-load/installed: ALSO := -r benchmarks/load.txt
.venv-load/installed: benchmarks/load.txt
.venv-demo/installed .venv-test/installed .venv-docs/installed .venv-bench/installed .venv-swaps/installed .venv-fleet/installed .venv-agents/installed .venv-solved/installed .venv-solved-real/installed .venv-mcp/installed .venv-gateway/installed .venv-load/installed: pyproject.toml
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
