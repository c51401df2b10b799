# Houndloop: `make demo` runs the whole loop on this machine, `make test` the tests. `make help` lists the rest.
SHELL := /bin/bash
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first Python of a supported version that runs; python3 if there is none, to be named in the error.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	"$$p" -c '$(SUPPORTED)' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FOR_STACK = $(if $(STACK),--stack $(STACK))
export SAM_CLI_TELEMETRY := 0

.PHONY: help demo up down delete backlog redrive reconcile replay runs retrain back test lock check lint types templates clean
.DEFAULT_GOAL := help

help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(READY) ## Run the whole loop here; DATA=folder, WEIGHTS=file, PORT=n, KEEP=1
	@$(BIN)/python -m local.demo

up: $(READY) ## AWS on this machine with the stack deployed, until Ctrl-C; PORT=n, KEEP=1 goes on from the last KEEP=1, PARAMETERS="A=1 B=2"
	@$(BIN)/python -m local up $(if $(PORT),--port $(PORT)) $(if $(KEEP),--keep) $(PARAMETERS:%=--parameter %)

down: $(READY) ## Stop what `make demo KEEP=1` left running
	@$(BIN)/python -m local down

delete: $(READY) ## Delete a stack on AWS with all that it made; STACK=name
	@$(BIN)/python tools/delete_stack.py $(or $(STACK),$(error Say which: make delete STACK=houndloop))

backlog: $(READY) ## Say what is queued in the inbox of a stack; STACK=name
	@$(BIN)/python tools/inbox.py $(FOR_STACK) backlog

redrive: $(READY) ## Send what failed for good once more; STACK=name, LABELS=1 for labels and runs
	@$(BIN)/python tools/inbox.py $(FOR_STACK) redrive $(if $(LABELS),--labels)

reconcile: $(READY) ## Find pictures in the inbox whose event was lost; STACK=name
	@$(BIN)/python tools/inbox.py $(FOR_STACK) reconcile

replay: $(READY) ## Classify pictures again; OF=--review (or --failed, --classified --from DAY, …), STACK=name
	@$(BIN)/python tools/inbox.py $(FOR_STACK) replay $(or $(OF),--review)

runs: $(READY) ## Say how the last retraining runs ended, and why; STACK=name
	@$(BIN)/python tools/runs.py $(FOR_STACK) list

retrain: $(READY) ## Start a retraining run; FORCE=1 to repeat one, STACK=name
	@$(BIN)/python tools/runs.py $(FOR_STACK) start $(if $(FORCE),--force)

back: $(READY) ## Go back to an earlier model, guarded as every deployment; TO=model version or deployment, STACK=name
	@$(BIN)/python tools/runs.py $(FOR_STACK) back $(TO)

test: $(READY) ## Run all tests, as many at once as there are cores; JOBS=n
	@$(BIN)/python -m pytest --numprocesses $(or $(JOBS),logical) --maxprocesses 4 --dist loadfile

check: $(READY) lint types templates ## Lint, types and template checks

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

templates: $(READY)
	@$(BIN)/cfn-lint template.yaml
	@AWS_DEFAULT_REGION=us-east-1 $(BIN)/sam validate --lint

lock: ## Pin what requirements.in asks for, from a fresh environment
	@rm -rf .houndloop/lock && mkdir -p .houndloop && "$(PYTHON)" -m venv .houndloop/lock
	@.houndloop/lock/bin/pip install --quiet --disable-pip-version-check "$$(grep -o '^torch==[0-9.]*' requirements.in)"
	@.houndloop/lock/bin/pip install --quiet --disable-pip-version-check -r requirements.in
	@{ echo '# Everything that requirements.in asks for, pinned. Made by `make lock`; do not edit.'; \
	  .houndloop/lock/bin/pip freeze --all --exclude pip | sed 's/+cpu//'; } > requirements.txt
	@rm -rf .houndloop/lock

clean: ## Remove the virtual environment and all working state
	rm -rf $(VENV) .houndloop .aws-sam

# The virtual environment is made anew when the pinned requirements change.
$(READY): requirements.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' || { echo "Houndloop needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$("$(PYTHON)" --version 2>/dev/null || echo not there). Install one, or name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	@echo "Making the virtual environment $(VENV) with $$("$(PYTHON)" --version), and installing what Houndloop needs (2 GB or more, a few minutes) …"
	@"$(PYTHON)" -m venv $(VENV)
	@# torch first and alone: what depends on it then finds it installed and does not choose another build of it.
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$$(grep -o 'smdebug==[0-9.]*' requirements.in)"
	@touch $(READY)
	@echo "Installed."
