# Two commands do all set-up on a fresh Debian or Ubuntu with Go: make run, make test.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.linked=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false
RUNC_VERSION := 1.5.2

.PHONY: all build deps engines test test-short lint generate bench run clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

deps: ## install what is missing: git, ssh, a C compiler and libseccomp for runc, CA roots
	@tools/deps.sh
	@$(MAKE) -s testdata/webhooks/node_modules testdata/clients/node_modules

# Webhook payloads that others wrote; tests read them.
testdata/webhooks/node_modules: testdata/webhooks/package.json
	@cd testdata/webhooks && npm install --no-audit --no-fund --no-package-lock --ignore-scripts --loglevel=error >/dev/null
	@touch $@

# Clients that others wrote, and the compiler that ours are checked with.
testdata/clients/node_modules: testdata/clients/package-lock.json
	@cd testdata/clients && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error >/dev/null
	@touch $@

build: engines ## build m3o, m3od, m3o-shim and, when stale, runc and buildkitd into bin/
	$(GOBUILD) -ldflags '$(LDFLAGS)' -o bin/ ./cmd/m3o ./cmd/m3od ./cmd/m3o-shim
	$(GOBUILD) -o bin/tools/ ./tools/askgrpc

# The engines are slow to link and change only with the modules they come from.
engines: bin/buildkitd bin/runc

bin/buildkitd: go.mod go.sum
	$(GOBUILD) -ldflags '-s -w' -o $@ github.com/moby/buildkit/cmd/buildkitd
	@touch $@

bin/runc: tools/runc/go.mod tools/runc/go.sum
	@tools/deps.sh
	cd tools/runc && CGO_ENABLED=1 go build -trimpath -buildvcs=false -tags 'seccomp netgo osusergo' \
	  -ldflags '-s -w -X main.version=$(RUNC_VERSION) -extldflags -static' -o ../../$@ github.com/opencontainers/runc
	@touch $@

test: deps build ## every test, with the race detector
	@tools/test.sh

test-short: ## what needs neither root nor engines, in 30 s
	go test -short ./...

lint: ## vet, staticcheck, errcheck, gofmt
	@tools/lint.sh

generate: ## regenerate api/ and the references in docs/ (needs protoc; make deps installs it)
	$(GOBUILD) -o bin/tools/ google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
	PATH="$(CURDIR)/bin/tools:$$PATH" go generate ./api
	go run ./tools/docgen

bench: deps build ## the budgets, each beside its reference, into docs/benchmarks.md
	@tools/deps.sh bench
	go run ./cmd/m3o-bench

run: deps build ## start m3o here; on a first start push a sample service and print its answer
	@tools/run.sh

clean: ## remove what build made
	rm -rf bin
