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

.PHONY: help torture probe crash sim mutants test test-unit test-integration test-vm test-scripts fuzz shrinking user-crate mutants-device confusion lint bench release

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

torture: release ## Torture a ublk device: seeded random I/O, every byte verified (the main job)
	$(RUN) -- $(TORTURE) torture --report $(REPORTS)/torture $(ARGS)

probe: release ## Check step by step that both sides of the stack agree
	$(RUN) -- $(TORTURE) probe --report $(REPORTS)/probe $(ARGS)

crash: release ## Power cuts: what was flushed and fsynced is there, on the raw device, on ext4 and on XFS
	$(RUN) -- $(TORTURE) crash --report $(REPORTS)/crash $(ARGS)

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
	ci/vm --kernel $(KERNEL) --timeout $(TIMEOUT) --rwdir $(REPORTS) -- ci/integration run

test-scripts: ## Tests of ci/vm itself, and of the program `ublkit` in a VM
	$(CARGO) build --quiet -p ublkit --features cli
	ci/vm --kernel $(KERNEL) --timeout $(TIMEOUT) -- ci/tests/cli target/debug/ublkit
	ci/tests/vm $(KERNEL)

fuzz: ## Arbitrary input for everything that reads any: DURATION seconds for each target, TARGETS or all
	$(CARGO) run --profile fuzz --quiet -p ublkit-fuzz -- --duration $(DURATION) $(TARGETS)

shrinking: ## A failing script of 5,000 operations for every known bug, made small
	$(CARGO) run --release --quiet -p ublkit-harness --example shrinking

user-crate: ## A crate outside this workspace tests its backends, as an unprivileged user
	ci/user-crate

mutants-device: release ## The known bugs that a real device can have, planted in one after another
	$(RUN) -- $(TORTURE) mutants --device-mode --report $(REPORTS)/mutants-device $(ARGS)

confusion: ## What the classifier calls corruptions of every class
	$(CARGO) run --release --quiet -p ublkit-harness --example confusion

lint: ## Formatting, clippy, documentation, shell scripts
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets --all-features --quiet -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --all-features --no-deps --quiet
	ci/unsafe

bench: ## What the data path and the verification cost, in counts and ratios
	ci/bench

release:
	@mkdir -p $(REPORTS)
	$(CARGO) build --release --quiet -p ublk-torture
