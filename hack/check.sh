#!/bin/bash
# check.sh: format, vet and lint with the layering rules, generated files, scripts, documents.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail=0
step() { printf '== %s\n' "$*"; }

step gofmt
unformatted=$(gofmt -l $(go list -f '{{.Dir}}' ./...))
if [ -n "$unformatted" ]; then
	printf 'not formatted, run gofmt -w on:\n%s\n' "$unformatted"
	fail=1
fi

step go vet
go vet -tags "runc_nocriu seccomp netgo osusergo" ./... || fail=1

step go mod verify tidy
go mod tidy -diff >/dev/null || { echo "go.mod or go.sum is not tidy: run go mod tidy"; fail=1; }

step golangci-lint
hack/lint.sh || fail=1

step shell scripts
for script in hack/*.sh .ci/run test/guest/*.sh; do
	[ ! -e "$script" ] || bash -n "$script" || fail=1
done

step generated files
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
cp -r docs/deps "$before/"
hack/generate.sh
if ! diff -r "$before/deps" docs/deps; then
	echo "docs/deps changed: an executable links other modules than before; look at the difference and commit it"
	fail=1
fi

step links in documents
go run ./hack/doccheck README.md ARCHITECTURE.md SCOPE.md docs || fail=1

[ $fail = 0 ] && echo "check: ok"
exit $fail
