VENV ?= .venv
PY = $(VENV)/bin/python
BENCH = $(VENV)-bench
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$python && break; done)
EXAMPLES = fastapi plans flask django outbound llm-proxy
# As many processes as there are cores, each with servers of its own; one that has nothing left takes from another.
PYTEST = bin/pytest --numprocesses=logical --dist=worksteal
CODE = ratelimit tests $(wildcard examples benchmarks)

.PHONY: help demo examples test test-core test-benchmarks servers interop soak docs dist lint format bench bench-quick bench-failover clean
.NOTPARALLEL:

help: ## list the targets
	@awk -F ' ?## ' '/^[a-z-]+:.*##/ { sub(/:.*/, "", $$1); printf "make %-20s%s\n", $$1, $$2 }' Makefile
	@echo 'Variables: ARGS (make test ARGS="-k demo"), SERVERS (programs), PYTHON (the interpreter), VENV (the environment)'

demo: $(VENV)/installed-demo ## show the limiter at work against a Redis server of its own
	$(VENV)/bin/ratelimit demo $(ARGS)

examples: $(VENV)/installed-examples ## run the examples, a minute; each alone: make example-fastapi (or -plans, -flask, -django, -outbound, -llm-proxy)
	@for name in $(EXAMPLES); do $(MAKE) --no-print-directory example-$$name || exit 1; done

.PHONY: $(EXAMPLES:%=example-%)
$(EXAMPLES:%=example-%): example-%: $(VENV)/installed-examples
	$(PY) examples/run.py $* $(ARGS)

test: $(VENV)/installed-test ## run the tests, on all cores
	$(VENV)/$(PYTEST) $(ARGS)

test-core: $(VENV)-core/installed-test-core ## run the tests that need no server where no integration is installed
	RATELIMIT_TEST_WITHOUT_EXTRAS=1 $(VENV)-core/$(PYTEST) -m 'not redis' $(ARGS)

test-benchmarks: $(VENV)/installed-test ## run the tests of the benchmarks
	$(VENV)/$(PYTEST) tests/test_benchmarks.py $(ARGS)

servers: ## run the tests that need a server on each Redis and Valkey that can be had, or on SERVERS
	.ci/servers $(SERVERS)

interop: $(VENV)/installed-test ## run the tests that share buckets with Bucket4j; needs JDK 17 and Maven
	mvn --quiet --batch-mode --file tests/promises/interop/pom.xml compile
	$(VENV)/bin/pytest tests/promises/interop $(ARGS)

soak: $(VENV)/installed-soak ## run storms of interruptions, a mixed load over a bad network for ten minutes, and a fuzzer
	$(if $(ARGS),,RATELIMIT_STORM_SECONDS=60 $(VENV)/bin/pytest -q tests/promises/test_interruptions.py)
	$(PY) -m tests.promises.soak $(ARGS)

docs: $(VENV)/installed-docs ## make a site of the pages and of the reference in build/docs/, a quarter of a minute
	$(VENV)/bin/sphinx-build -q -W --keep-going -c docs -d build/docs-cache . build/docs $(ARGS)
	@echo build/docs/index.html

dist: $(VENV)/installed-test ## build the packages in dist/; for a release with RATELIMIT_REPOSITORY_URL=https://HOST/OWNER/NAME
	$(PY) -m build

lint: $(VENV)/installed-dev ## check style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy --strict $(CODE)
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(PY) .ci/prose.py ratelimit lua tests benchmarks examples docs README.md CHANGELOG.md Makefile .ci

format: $(VENV)/installed-dev ## repair style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(BENCH)/installed ## measure against other limiters, some twenty minutes, and write benchmarks/RESULTS.md
	$(BENCH)/bin/python -m benchmarks $(ARGS)

bench-quick: $(BENCH)/installed ## the same in short, some three minutes, into benchmarks/out/
	$(BENCH)/bin/python -m benchmarks --quick $(ARGS)

bench-integrations: $(BENCH)/installed ## measure what a limit adds to a request in each framework and to a service, and write benchmarks/INTEGRATIONS.md
	$(BENCH)/bin/python -m benchmarks.integrations $(ARGS)

bench-failover: $(VENV)/installed-test ## measure what is lost when another server takes over, a few minutes
	$(PY) -m benchmarks.failover $(ARGS)

clean: ## remove the environments and all that was generated
	rm -rf $(VENV) $(VENV)-core $(BENCH) benchmarks/out tests/promises/interop/target tests/promises/soak/out build dist
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)-core/installed-test-core: pyproject.toml
	$(MAKE) --no-print-directory VENV=$(VENV)-core $@

# The project with one of its extras; again only when pyproject.toml has changed.
$(VENV)/installed-%: pyproject.toml | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --default-pip >/dev/null 2>&1 || .ci/bootstrap_pip $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@$(PY) .ci/provide_redis.py
	@touch $@

# The benchmark's own: with the limiters that it measures, at the versions that RESULTS.md is about.
$(BENCH)/installed: pyproject.toml benchmarks/requirements.txt | $(BENCH)/bin/python
	@$(BENCH)/bin/python -m pip --version >/dev/null 2>&1 || $(BENCH)/bin/python -m ensurepip --default-pip >/dev/null 2>&1 \
		|| .ci/bootstrap_pip $(BENCH)/bin/python
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]' \
		--requirement benchmarks/requirements.txt
	@$(BENCH)/bin/python .ci/provide_redis.py
	@touch $@

# Without pip, because Debian's python3 lacks ensurepip unless python3-venv is installed too.
$(PY) $(BENCH)/bin/python:
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || \
		{ echo 'Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(@:/bin/python=)
