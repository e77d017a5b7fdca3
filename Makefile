VENV ?= .venv
# The first that is new enough and can make virtual environments.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUITABLE)' 2>/dev/null && echo $$python && break; done)
SUITABLE = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

.PHONY: demo
demo: $(VENV)/.demo  ## serve examples/articles; PORT= and DATABASE_URL= choose where
	@$(VENV)/bin/python -m examples.articles

# $(VENV)/.x is there when the environment has the extra x of pyproject.toml.
$(VENV)/.%: pyproject.toml
	@'$(PYTHON)' -c '$(SUITABLE)' 2>/dev/null || { \
		echo 'Python 3.11 or newer with venv is needed, and $(or $(PYTHON),python3) is not that.'; \
		echo 'Install it (Debian: apt install python3-venv), or name it: make PYTHON=/path/to/python'; \
		exit 1; } >&2
	@test -x $(VENV)/bin/pip || '$(PYTHON)' -m venv $(VENV)
	@echo 'Installing repom[$*] into $(VENV) ...'
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# One process for each core; WORKERS= for a single one, in which `ARGS=--pdb` works.
WORKERS ?= --numprocesses=auto --dist=worksteal

.PHONY: test
test: $(VENV)/.test,users  ## all tests; PostgreSQL and MariaDB where they are reachable
	$(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

.PHONY: test-cluster
test-cluster: $(VENV)/.test,users  ## replicas, Galera, PgBouncer: real ones, which it installs (as root) and starts
	tests/cluster/servers/install.sh
	$(VENV)/bin/python -m pytest tests/cluster $(ARGS)

REQUESTS ?= 10000
.PHONY: soak
soak: $(VENV)/.test,users  ## that many mixed requests (REQUESTS=) on each database; SEED= repeats
	REPOM_SOAK_REQUESTS='$(REQUESTS)' REPOM_SOAK_SEED='$(SEED)' \
		$(VENV)/bin/python -m pytest tests/soak/test_soak.py --capture=no $(ARGS)

.PHONY: coverage
coverage: $(VENV)/.test,users  ## the same, with the lines and branches that no test has run
	$(VENV)/bin/python -m pytest $(WORKERS) --cov --cov-report=term-missing $(ARGS)

.PHONY: lint
lint: $(VENV)/.test,users,lint  ## style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

.PHONY: bench
bench:  ## repom against hand-written code and its peers; ARGS=--short takes less time, ARGS=--quick none
	@'$(PYTHON)' -m benchmarks.environments
	.venv-bench-runner/bin/python -m benchmarks $(ARGS)

.PHONY: docs
docs: $(VENV)/.docs  ## the documentation as HTML
	$(VENV)/bin/sphinx-build --fail-on-warning --quiet docs docs/_build
	@echo 'docs/_build/index.html'

# Each combination has an environment of its own. FastAPI Users, the extra `users`, needs
# SQLAlchemy 2.0.
COMBINATIONS = 3.11-2.0 3.11-2.1 3.12-2.0 3.12-2.1 3.13-2.0 3.13-2.1
.PHONY: test-all $(COMBINATIONS)
test-all: $(COMBINATIONS)  ## every Python and SQLAlchemy that repom supports

$(COMBINATIONS): version = $(firstword $(subst -, ,$@))
$(COMBINATIONS): sqlalchemy = $(lastword $(subst -, ,$@))
$(COMBINATIONS): environment = .venv-$@
# Of the PATH, else one that pyenv has installed.
$(COMBINATIONS): python = $(shell python$(version) -c 'import sys; print(sys.executable)' 2>/dev/null \
	|| ls -d "$$(pyenv root 2>/dev/null)"/versions/$(version).*/bin/python 2>/dev/null | tail -n 1)
$(COMBINATIONS):
	@if test -z '$(python)'; then \
		echo 'Python $(version) is not installed: $@ is left out'; \
	else \
		echo '== Python $(version), SQLAlchemy $(sqlalchemy)' && \
		{ test -x $(environment)/bin/pip || '$(python)' -m venv $(environment); } && \
		$(environment)/bin/python -m pip install --quiet --disable-pip-version-check \
			--editable '.[test$(if $(filter 2.0,$(sqlalchemy)),$(comma)users)]' \
			'sqlalchemy==$(sqlalchemy).*' && \
		$(environment)/bin/python -X dev -W error -m pytest $(WORKERS) --quiet $(ARGS); \
	fi
comma := ,

.PHONY: costs
costs:  ## write down what a request costs, in each environment that `make test-all` has made
	@for environment in $(wildcard $(addprefix .venv-,$(COMBINATIONS))); do \
		echo "== $$environment" && $$environment/bin/python -m benchmarks.cost --update || exit 1; \
	done

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
