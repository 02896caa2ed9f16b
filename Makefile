# Everything the project does, it does through these targets; CI runs the same ones.
#
#   make build    static binaries in bin/
#   make demo     a fabric of three hosts on this machine, with real traffic
#   make test     every test, on the real kernel and real databases (root, or user namespaces for a part)
#   make lint     formatting, vet, staticcheck, import rules
#   make fuzz     every fuzz target for FUZZTIME each
#   make bench    figures beside their baselines; ONLY=cni for one room
#   make deps     installs what is missing on Debian or Ubuntu (the targets above call it)

SHELL := /bin/bash
GO ?= go
PROGRAMS := $(notdir $(wildcard cmd/*))
BINARIES := $(addprefix bin/,$(PROGRAMS))
FUZZTIME ?= 10s
TESTFLAGS ?=
SOURCES := go.mod go.sum $(shell find . -name '*.go' -not -name '*_test.go' -not -path './bench/*') $(shell find . -name '*.sql')
export CGO_ENABLED := 0

# One way to compile for build, vet and test: what differs in its flags is compiled again, with all libraries.
export GOFLAGS := $(GOFLAGS) -trimpath

# Packages under test at once: tests wait, for timers and for the kernel, longer than they compute.
PACKAGES ?= $(shell echo $$((2 * $$(nproc))))

.PHONY: all build test race lint fuzz bench demo deps clean

all: build

build: $(BINARIES)

bin/%: $(SOURCES)
	@mkdir -p bin
	$(GO) build -ldflags='-s -w' -o $@ ./cmd/$*

deps:
	@packaging/install-deps

demo: build
	@packaging/demo

test: deps build
	$(GO) test -p $(PACKAGES) -timeout 15m $(TESTFLAGS) ./...

race: deps build
	CGO_ENABLED=1 $(GO) test -race -short -timeout 20m $(TESTFLAGS) ./...

lint:
	@out=$$(gofmt -l .); test -z "$$out" || { echo "gofmt: $$out"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) mod verify >/dev/null
	$(GO) test -count=1 ./internal/archtest

# Before Go 1.27 the engine sometimes takes the end of its own time for a failure (go.dev/issue/75804): without a failing input nothing was found.
fuzz:
	@set -e; for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "$$pkg $$f"; \
	    out=$$($(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$pkg 2>&1) || { \
	      echo "$$out"; echo "$$out" | grep -qx ' *context deadline exceeded' && ! echo "$$out" | grep -qE 'Failing input|panic:'; }; \
	  done; done

bench: deps build
	$(GO) run ./bench/silkbench $(if $(ONLY),-only $(ONLY))

clean:
	rm -rf bin bench/out
