# aiotun: each target makes what it needs; see `make help`.
#
# PYTHON=...  the interpreter to use, instead of the first usable one
# WHOLE=...   for test-dist: the Python versions that run all tests, instead of every version
# ARGS=...    more arguments for pytest, the demo, the fuzzer or the benchmarks
# MINUTES=... how long the soak runs
# KERNELS=... for test-kernels: 5.10, 6.1, 6.12, newest; all of them if it is not set

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-others test-all test-peers test-boringtun fuzz soak lint docs bench bench-vpn bench-tap bench-peers bench-netstack bench-report clean
.PHONY: coverage dist release-check test-dist test-lowest audit man test-free-threaded test-foreign test-kernels test-musl
MAKEFLAGS += --no-print-directory

ARGS ?=
MINUTES ?= 30
export PYTHON WHOLE

# $(call venv,GROUP) prepares .venv with that dependency group of pyproject.toml.
venv = python=$$(tools/python.sh) && tools/venv.sh .venv "$$python" $(1)

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-26s%s\n", $$1, $$2 }'

demo: ## ping a device that a Python program answers on; needs no root
	@$(call venv,none) && .venv/bin/python -m aiotun demo $(ARGS)

test: ## run the tests, in private network namespaces; needs no root
	@$(call venv,test) && .venv/bin/python -m pytest -m "not peers and not slow" $(ARGS)

test-others: ## run the tests on every other Python from 3.11 on this machine
	@tools/test_others.sh $(ARGS)

test-all: test test-others ## run the tests on every Python

test-peers: ## run the tests that exchange packets with other implementations
	@$(call venv,test) && tools/peers.sh mitmproxy && .venv/bin/python -m pytest -m "peers and not slow" $(ARGS)

test-boringtun: ## run the WireGuard example with boringtun, which cargo builds; takes 6 minutes
	@$(call venv,test) && tools/peers.sh boringtun && .venv/bin/python -m pytest tests/integration/test_boringtun.py -n 2 $(ARGS)

test-free-threaded: ## two threads at once, on a free-threaded Python, which it builds; ARGS=SECONDS
	@python=$$(tools/free_threaded.sh) && \
		AIOTUN_SPEEDUPS=require tools/venv.sh .venvs/free-threaded "$$python" none && \
		.venvs/free-threaded/bin/python -W error -m tests.parallel $(ARGS) && \
		.venvs/free-threaded/bin/python -W error -m aiotun demo --count 1

# Debian's Pythons and kernels for other machines, in .foreign.
foreign = python=$$(tools/python.sh) && tools/venv.sh .venvs/release "$$python" release && \
	tools/venv.sh .venv "$$python" test

test-foreign: ## run the tests that need no device on emulated arm64 and s390x (big-endian)
	@$(foreign) && tools/test_foreign.sh $(ARGS)

test-musl: ## run the tests that need no device on a Python built with musl, which it builds
	@python=$$(tools/python.sh) && tools/venv.sh .venvs/release "$$python" release && tools/test_musl.sh $(ARGS)

test-kernels: ## boot other kernels in QEMU and run the tests there; KERNELS="5.10 6.1", ARGS=--basic
	@$(foreign) && tools/foreign.sh amd64 && .venv/bin/python -m tests.kernels $(KERNELS) $(ARGS)

fuzz: ## fuzz every parser for a minute in all; ARGS="SECONDS TARGET ...", ARGS=--help
	@$(call venv,fuzz) && .venv/bin/python -m fuzz $(ARGS)

soak: ## run mixed traffic and account for every packet; MINUTES=30
	@$(call venv,test) && .venv/bin/python -m tests.soak --minutes $(MINUTES) $(ARGS)

lint: ## run ruff, mypy and pyright; ARGS=mypy for one of them
	@$(call venv,dev) && tools/lint.sh $(ARGS)

# Warnings are errors. All pages are read each time (-E), because Sphinx does not repeat the warnings
# of a page that has not changed.
docs: ## build the documentation, into build/docs
	@$(call venv,docs) && .venv/bin/python -m sphinx -E -d build/doctrees -W --keep-going -q $(ARGS) docs build/docs
	@echo build/docs/index.html

bench: ## run the benchmarks
	@$(call venv,test) && .venv/bin/python -m benchmarks $(ARGS)

bench-vpn: ## compare the VPN examples with wireguard-go and OpenVPN
	@$(call venv,test) && .venv/bin/python -m benchmarks.vpn && .venv/bin/python -m benchmarks vpn $(ARGS)

bench-tap: ## benchmark QEMU guests and DHCP clients on TAP devices
	@$(call venv,test) && .venv/bin/python -m benchmarks tap $(ARGS)

bench-peers: ## compare aiotun with other libraries, which it fetches; ARGS="forward --runs 7"
	@$(call venv,test) && .venv/bin/python -m benchmarks.peers $(ARGS)

bench-netstack: ## compare the netstack, aiotun run and the proxies with others, which it fetches; ARGS="streams --runs 3"
	@$(call venv,test) && .venv/bin/python -m benchmarks.netstack $(ARGS)

bench-report: ## make docs/benchmarks.md and its charts from benchmarks/results
	@$(call venv,test) && .venv/bin/python -m benchmarks.report $(ARGS)

dist: ## build the sdist and the wheels into dist/, and check them
	@python=$$(tools/python.sh) && tools/venv.sh .venvs/release "$$python" release && tools/dist.sh

test-dist: ## install what `make dist` built on every Python, and run the tests with the wheel
	@tools/test_dist.sh $(ARGS)

test-lowest: ## run the tests with the lowest versions of what aiotun needs
	@tools/test_lowest.sh $(ARGS)

audit: ## check what aiotun and its extras install for known vulnerabilities
	@python=$$(tools/python.sh) && tools/venv.sh .venvs/release "$$python" release && tools/audit.sh

coverage: ## measure the branch coverage of src/aiotun; build/coverage/html has each line
	@python=$$(tools/python.sh) && tools/venv.sh .venvs/coverage "$$python" coverage && tools/coverage.sh $(ARGS)

man: ## make the man page docs/aiotun.8 from the texts of the command's --help
	@$(call venv,none) && .venv/bin/python tools/manual.py >docs/aiotun.8

release-check: ## print what is still to be done before a release
	@python=$$(tools/python.sh) && "$$python" tools/release.py

clean: ## remove the files that the other targets made
	@rm -rf .venv .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info src/aiotun/_packets/_speedups*.so
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
