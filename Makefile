# Varve. `make help` lists the targets.
SHELL := /bin/bash
export CARGO_TERM_COLOR ?= auto
NEXTEST := cargo nextest run --workspace --no-fail-fast
DESTDIR ?=
PROGRAMS ?= target/release
PREFIX ?= /usr
BIN := $(DESTDIR)$(PREFIX)/bin
UNITS := $(DESTDIR)/usr/lib/systemd/system
MANUAL := $(DESTDIR)$(PREFIX)/share/man
COMPLETIONS := $(DESTDIR)$(PREFIX)/share
RULES := $(DESTDIR)/usr/lib/udev/rules.d

.PHONY: help setup build demo check test vm bench install clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what building and testing need (Debian, Ubuntu; as root)
	@tools/setup

build: setup ## build the programs
	cargo build --release

demo: build ## protect a scratch disk, lose data, get every instant back (as root)
	@tests/demo

check: setup ## format, lints, tidy, unit tests
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo nextest run --workspace --lib --bins -E 'not binary(/^vm/)'
	cargo nextest run -p varve-tests --test tidy

test: setup ## all rooms, with the small numbers (as root; about twenty minutes after the build, with test kernels)
	@[[ -n "$$VARVE_TEST_KERNELS" ]] || echo "SKIPPED: what needs a real ublk (VARVE_TEST_KERNELS is not set; see README)"
	@[[ -n "$$VARVE_TEST_SYSTEM" ]] || echo "SKIPPED: a whole system with systemd and udev (VARVE_TEST_SYSTEM is not set; see README)"
	cargo build --workspace
	$(NEXTEST)

vm: setup ## everything on every test kernel, with the large numbers (hours)
	cargo build --workspace
	VARVE_TEST_SIZE=large $(NEXTEST) --profile vm -E 'binary(/^vm/) + binary(flips) + binary(scrub) + binary(damage) + binary(failing_disk)'

bench: build ## figures as ratios: raw disk, plain loop, Varve; hot copies; the store (as root)
	@tests/bench
	@tests/bench-hcp
	@tests/bench-store
	@tests/bench-images
	@tests/bench-backups

install: ## install into DESTDIR: programs, units, udev rules, manual pages, completions
	install -d $(BIN) $(UNITS) $(RULES) $(MANUAL)/man1 $(MANUAL)/man8 $(COMPLETIONS)/bash-completion/completions $(COMPLETIONS)/zsh/site-functions
	install -m 0755 $(PROGRAMS)/blkfilter $(PROGRAMS)/varved $(PROGRAMS)/varve $(PROGRAMS)/hcp $(BIN)
	install -m 0644 blkfilter/filter/systemd/blkfilter.service engine/daemon/systemd/varved.service $(UNITS)
	install -m 0644 blkfilter/filter/systemd/60-varve.rules $(RULES)
	install -m 0644 blkfilter/filter/man/blkfilter.8 engine/daemon/man/varved.8 $(MANUAL)/man8
	$(PROGRAMS)/varve manual $(MANUAL)/man1
	$(PROGRAMS)/hcp --manual $(MANUAL)/man1
	$(PROGRAMS)/hcp --completions bash >$(COMPLETIONS)/bash-completion/completions/hcp
	$(PROGRAMS)/hcp --completions zsh >$(COMPLETIONS)/zsh/site-functions/_hcp
	$(PROGRAMS)/varve completions bash >$(COMPLETIONS)/bash-completion/completions/varve
	$(PROGRAMS)/varve completions zsh >$(COMPLETIONS)/zsh/site-functions/_varve

clean: ## remove what was built
	cargo clean
