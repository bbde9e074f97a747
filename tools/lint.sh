#!/usr/bin/env bash
# gofmt, vet, staticcheck and errcheck over the module. Exceptions are written
# at the line, with the reason.
set -euo pipefail
bad=$(git ls-files -c -o --exclude-standard '*.go' | xargs -r gofmt -l)
if [ -n "$bad" ]; then
  echo "lint: gofmt would change:" >&2
  echo "$bad" >&2
  exit 1
fi
go vet ./...
go tool staticcheck ./...
# errcheck knows no exceptions at the line; it prints the line, so we do. A bare
# receive waits for an end, and what ended has told its error elsewhere. Tests
# check what they are about.
bad=$(go tool errcheck -ignoregenerated -ignoretests -exclude tools/errcheck.txt ./... | grep -vE 'nolint:errcheck|:[[:space:]]+(case )?<-' || true)
if [ -n "$bad" ]; then
  echo "lint: errors are dropped; handle them, or say why not with //nolint:errcheck // reason" >&2
  echo "$bad" >&2
  exit 1
fi
