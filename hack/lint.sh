#!/bin/bash
# lint.sh [ARG...] runs golangci-lint, built once per version into the cache (1.5 minutes cold).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=v2.15.0
dir=${BERTH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/berth}/tools/golangci-lint/$version
if [ ! -x "$dir/golangci-lint" ]; then
	echo "building golangci-lint $version" >&2
	(cd / && GOBIN=$dir GOFLAGS= go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version")
fi
# golangci-lint refuses to run beside another of its kind; a second tree on the machine is no reason to fail.
exec "$dir/golangci-lint" run --allow-parallel-runners "$@"
