# Berth. Two commands matter to a newcomer: `make demo` and `make test`.
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
CACHE   ?= $(if $(BERTH_CACHE),$(BERTH_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/berth)
export BERTH_CACHE := $(CACHE)
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

GOFLAGS_BUILD := -buildvcs=false -trimpath
LDFLAGS       := -s -w -X main.version=$(VERSION)
RUNNER_TAGS   := runc_nocriu seccomp netgo osusergo
# The tags of the runner apply to vet and lint too, so that they see the files it is built from.
STATIC_BINARIES := berth berthd berth-holder berth-init
BINARIES        := $(STATIC_BINARIES) berth-runner

# How long tests may take in all; the end-to-end scripts have deadlines of their own.
TEST_TIMEOUT ?= 30m
TEST_FLAGS   ?=

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install (as root) or name what building needs
	@hack/deps.sh build

.PHONY: build
build: deps ## build every executable into bin/
	@hack/build.sh "$(VERSION)" $(BINARIES)

.PHONY: tools
tools: ## find or build the docker client and its compose plugin
	@hack/tools.sh

.PHONY: images
images: ## build the image archives of the demo and the tests, without any registry
	@hack/images.sh

.PHONY: demo
demo: build ## start Berth with the sample application and leave it running
	@hack/demo.sh up

.PHONY: demo-down
demo-down: ## remove every trace of the demo
	@hack/demo.sh down

.PHONY: test
test: build ## everything that CI checks, as root
	@hack/test.sh

.PHONY: e2e
e2e: build ## only the end-to-end scripts; RUN=regexp chooses
	@hack/deps.sh test
	@hack/tools.sh >/dev/null
	@hack/images.sh >/dev/null
	BERTH_E2E=1 go test ./test/e2e -count=1 -timeout $(TEST_TIMEOUT) $(if $(RUN),-run '$(RUN)') $(if $(V),-v) $(TEST_FLAGS)

.PHONY: check
check: deps ## format, lint, layering, generated files clean
	@hack/check.sh

.PHONY: lint
lint: deps ## golangci-lint alone
	@hack/lint.sh

.PHONY: generate
generate: ## refresh the generated files that `make check` compares
	@hack/generate.sh

.PHONY: race
race: deps ## unit tests under the race detector
	go test -race -tags "$(RUNNER_TAGS)" -timeout $(TEST_TIMEOUT) ./internal/... ./cmd/...

.PHONY: soak
soak: build ## start, kill and restart for SOAK (default 10m), checking for leaks
	@hack/deps.sh test
	@hack/tools.sh >/dev/null
	@hack/images.sh >/dev/null
	BERTH_E2E=1 BERTH_SOAK=$(or $(SOAK),10m) go test ./test/e2e -count=1 -timeout 0 -v -run 'TestSoak'

.PHONY: bench
bench: build ## side-by-side tables with peers; WRITE=1 updates docs/benchmarks.md
	@hack/deps.sh bench
	@hack/images.sh >/dev/null
	go run ./test/bench -bin "$(CURDIR)/bin" $(if $(WRITE),-write docs/benchmarks.md) $(BENCH_FLAGS)

.PHONY: guest
guest: build ## boot a Debian kernel with cgroup v2 in QEMU and run a part of the tests there
	@hack/deps.sh guest
	@hack/tools.sh >/dev/null
	@hack/images.sh >/dev/null
	go run ./test/guest -bin "$(CURDIR)/bin" $(GUEST_FLAGS)

.PHONY: clean
clean: ## remove bin/
	rm -rf bin
