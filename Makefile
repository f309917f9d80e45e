# Everything there is to run. Targets that need a kernel with ublk use this one, as root, if it has it, and a VM with a
# Debian kernel otherwise; they say which (see ci/where). What is missing on a Debian-like machine is installed (ci/setup).
#
#   make torture ARGS='--duration 10m --seed 7'     arguments of the program
#   make torture UBLKIT_KERNEL=6.12                 in a VM, on this kernel
#   UBLK_TORTURE_DURATION=30m make torture          a long soak

.DEFAULT_GOAL := help
SHELL := bash
CARGO ?= cargo
ARGS ?=
KERNEL ?= 7.2
DURATION ?= 60
TARGETS ?=
# What a scenario's whole run may take in a VM, boot included; a longer soak needs more.
TIMEOUT ?= $(if $(UBLK_TORTURE_DURATION),48h,30m)
REPORTS := $(CURDIR)/reports
RUN := ci/run-on-kernel --timeout $(TIMEOUT) --rwdir $(REPORTS)
TORTURE := target/release/ublk-torture

.PHONY: help torture probe fault sim mutants test test-unit test-integration test-vm test-scripts fuzz shrinking user-crate mutants-device mutants-scenarios suite soak matrix confusion lint bench stress bench-cycle coverage flush-trace test-external sigkill control crash chain release

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

torture: release ## Torture a ublk device: seeded random I/O, every byte verified (the main job)
	$(RUN) -- $(TORTURE) torture --report $(REPORTS)/torture $(ARGS)

probe: release ## Check step by step that both sides of the stack agree
	$(RUN) -- $(TORTURE) probe --report $(REPORTS)/probe $(ARGS)

fault: release ## Errors of every kind, at every point, at every rate, and what comes after them
	$(RUN) -- $(TORTURE) fault --report $(REPORTS)/fault $(ARGS)

stress: release ## Devices by the thousand: churn, closes under load and from many sides, many at once; nothing is left
	$(RUN) -- $(TORTURE) stress --report $(REPORTS)/stress $(ARGS)

flush-trace: release ## Where the time goes between fsync and the backend: a picture, a trace, numbers (reports/flush-trace)
	$(RUN) -- $(TORTURE) flush-trace --report $(REPORTS)/flush-trace --writeback-age 2s --workers-backend 2 $(ARGS)

sigkill: release ## Kill a server at each point of its life, in each recovery mode, under verified load
	$(RUN) -- $(TORTURE) sigkill --report $(REPORTS)/sigkill $(ARGS)

control: release ## Every control and I/O command in every state of a device, then a seeded walk through the states
	$(RUN) -- $(TORTURE) control --report $(REPORTS)/control $(ARGS)

crash: release ## Power cuts: what was flushed and fsynced is there, on the raw device, on ext4 and on XFS
	$(RUN) -- $(TORTURE) crash --report $(REPORTS)/crash $(ARGS)

chain: release ## Devices stacked on devices, in one server process: ARGS='--processes --links 4' for one each
	$(RUN) -- $(TORTURE) chain --report $(REPORTS)/chain $(ARGS)

sim: release ## Torture the simulated device: seconds, no root, no VM
	$(TORTURE) torture --sim --report $(REPORTS)/sim $(ARGS)

mutants: release ## Plant every known bug in the simulated device: each has to be found, and no oddity taken for one
	$(TORTURE) mutants --report $(REPORTS)/mutants $(ARGS)

test: test-unit ## All tests: of the crates, then on a real kernel
	ci/integration build
	$(RUN) -- ci/integration run

test-unit: ## Tests that need no kernel with ublk and no root
	ci/unit

test-integration: ## Tests on this machine's own kernel; needs root and ublk_drv
	ci/integration build
	ci/integration run

test-vm: ## Tests on a real kernel in a VM: KERNEL=6.12, 6.18, 7.2 or 7.3-rc
	ci/integration build
	ci/vm --kernel $(KERNEL) --timeout $(TIMEOUT) --rwdir $(REPORTS) -- ci/integration run $(ARGS)

test-scripts: ## Tests of ci/vm itself, and of the program `ublkit` in a VM
	$(CARGO) build --quiet -p ublkit --features cli
	ci/vm --kernel $(KERNEL) --timeout $(TIMEOUT) -- ci/tests/cli target/debug/ublkit
	ci/tests/vm $(KERNEL)

test-external: ## ublk-torture on devices that it does not serve: nbdkit over NBD, sound and lossy; RUBLK=PROGRAM for rublk too
	ci/setup external
	$(CARGO) build --quiet -p ublk-torture
	ci/vm --kernel $(KERNEL) --timeout $(TIMEOUT) -- ci/tests/external target/debug/ublk-torture $(RUBLK)

fuzz: ## Arbitrary input for everything that reads any: DURATION seconds for each target, TARGETS or all
	$(CARGO) run --profile fuzz --quiet -p ublkit-fuzz -- --duration $(DURATION) $(TARGETS)

shrinking: ## A failing script of 5,000 operations for every known bug, made small
	$(CARGO) run --release --quiet -p ublkit-harness --example shrinking

user-crate: ## A crate outside this workspace tests its backends, as an unprivileged user
	ci/user-crate

mutants-device: release ## The known bugs that a real device can have, planted in one after another
	$(RUN) -- $(TORTURE) mutants --device-mode --report $(REPORTS)/mutants-device $(ARGS)

mutants-scenarios: release ## Every scenario has to catch the bugs that are planted for it, and to pass without one
	$(RUN) -- $(TORTURE) mutants --scenarios --report $(REPORTS)/mutants-scenarios $(ARGS)

suite: release ## The short runs of every scenario, and a table of them
	$(RUN) -- $(TORTURE) suite --report $(REPORTS)/suite --junit $(REPORTS)/suite.junit.xml $(ARGS)

soak: release ## Every scenario, round after round, for UBLK_TORTURE_DURATION, with a planted bug to catch in each
	$(RUN) -- $(TORTURE) soak --report $(REPORTS)/soak $(ARGS)

matrix: release ## The trials and the suite on every kernel, and one table: KERNELS='6.12 7.2', MATRIX_JOBS=2
	ci/matrix

confusion: ## What the classifier calls corruptions of every class
	$(CARGO) run --release --quiet -p ublkit-harness --example confusion

lint: ## Formatting, clippy, documentation, shell scripts
	$(CARGO) fmt --all -- --check
	$(CARGO) fmt --manifest-path harness/examples/user-crate/Cargo.toml -- --check
	$(CARGO) clippy --workspace --all-targets --all-features --quiet -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --all-features --no-deps --quiet
	ci/unsafe

bench: ## What the data path and the verification cost, in counts and ratios
	ci/bench

bench-cycle: ## Where the time of a device's life goes, in a guest that counts instructions instead of time
	ci/bench-cycle $(ARGS)

coverage: ## Which lines the tests reach, those on a real kernel included (reports/coverage)
	ci/coverage

release:
	@mkdir -p $(REPORTS)
	$(CARGO) build --release --quiet -p ublk-torture
