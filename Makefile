# aiotun: every target makes what it needs; see `make help`.
#
# PYTHON=...  the interpreter to use, instead of the first that will do
# ARGS=...    more arguments for pytest, the demo, the fuzzer or the benchmarks

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-others test-all test-peers fuzz fuzz-offload lint bench bench-vpn bench-peers bench-report clean
MAKEFLAGS += --no-print-directory

ARGS ?=
export PYTHON

# $(call venv,GROUP) leaves .venv ready, with that dependency group of pyproject.toml.
venv = python=$$(tools/python.sh) && tools/venv.sh .venv "$$python" $(1)

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-20s%s\n", $$1, $$2 }'

demo: ## ping a device that a Python program answers on; needs no root
	@$(call venv,none) && .venv/bin/python -m aiotun demo $(ARGS)

test: ## run the tests, in network namespaces of their own; needs no root
	@$(call venv,test) && .venv/bin/python -m pytest -m "not peers and not slow" $(ARGS)

test-others: ## the same on every other Python from 3.11 that this machine has
	@tools/test_others.sh $(ARGS)

test-all: test test-others ## test and test-others

test-peers: ## exchange packets with other implementations
	@$(call venv,test) && tools/test_peers.sh $(ARGS)

fuzz: ## feed a million mutated packets to what reads a stranger's bytes
	@$(call venv,test) && .venv/bin/python -m tests.fuzz.fuzz_decode $(ARGS)

lint: ## ruff, mypy and pyright
	@$(call venv,dev) && tools/lint.sh

fuzz-offload: ## damaged packets for the C module, under sanitizers; ARGS=seconds
	@$(call venv,test) && tools/fuzz_offload.sh $(ARGS)

bench: ## run the benchmarks
	@$(call venv,test) && .venv/bin/python -m benchmarks $(ARGS)

bench-vpn: ## the VPN examples beside wireguard-go and OpenVPN
	@$(call venv,test) && .venv/bin/python -m benchmarks.vpn && .venv/bin/python -m benchmarks vpn $(ARGS)

bench-peers: ## aiotun beside other libraries, which it fetches; ARGS="forward --runs 7"
	@$(call venv,test) && .venv/bin/python -m benchmarks.peers $(ARGS)

bench-report: ## docs/benchmarks.md and its charts, from benchmarks/results/peers.json
	@$(call venv,test) && .venv/bin/python -m benchmarks.report $(ARGS)

clean: ## remove what the other targets made
	@rm -rf .venv .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info src/aiotun/_speedups*.so
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
