#!/bin/bash
# build.sh VERSION BINARY... builds executables into bin/, showing how far it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=$1
shift
mkdir -p bin

# progress counts the packages that `go build -v` names on its standard error; a cold build
# compiles several hundred, a warm one none.
progress() {
	awk -v name="$1" -v tty="$([ -t 1 ] && echo 1 || echo 0)" '
		/^[A-Za-z0-9_.~\/-]+$/ { n++
			if (tty) printf "\r  %-14s %4d packages compiled", name, n
			else if (n % 200 == 0) printf "  %-14s %4d packages compiled\n", name, n
			fflush(); next }
		{ print > "/dev/stderr" }
		END { if (tty && n) printf "\r\033[K" }'
}

for name in "$@"; do
	[ -d "cmd/$name" ] || { echo "build.sh: cmd/$name does not exist" >&2; exit 1; }
	started=$SECONDS
	ldflags="-s -w -X main.version=$version"
	if [ "$name" = berth-runner ]; then
		# libcontainer needs cgo and libseccomp; static, because the runner enters other roots.
		CGO_ENABLED=1 go build -v -buildvcs=false -trimpath -tags "runc_nocriu seccomp netgo osusergo" \
			-ldflags "$ldflags -linkmode external -extldflags -static" -o "bin/$name" "./cmd/$name" 2>&1 | progress "$name"
	else
		CGO_ENABLED=0 go build -v -buildvcs=false -trimpath -ldflags "$ldflags" -o "bin/$name" "./cmd/$name" 2>&1 | progress "$name"
	fi
	printf '  bin/%-14s %5.1f MB  %3d s\n' "$name" "$(awk "BEGIN{print $(stat -c %s "bin/$name")/1e6}")" $((SECONDS - started))
done
