#!/bin/bash
# test.sh: every test that CI runs. As root: unit tests that need it make their own namespaces.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
timeout=${TEST_TIMEOUT:-30m}
if [ "$(id -u)" != 0 ]; then
	echo "test: run as root (sudo make test): containers need it, and no test is skipped silently" >&2
	exit 1
fi
hack/deps.sh test guest
eval "$(hack/tools.sh)" # where the machine has no docker client, the tests use this one
unset DOCKER_CONFIG     # tests have their own
hack/images.sh >/dev/null

# One failure must not hide the next: all parts run, the worst status is the result.
fail=0
echo "== unit tests"
go test -tags "runc_nocriu seccomp netgo osusergo" -count=1 -timeout "$timeout" $(go list ./... | grep -v '/test/') || fail=1
echo "== end-to-end scripts"
BERTH_E2E=1 go test ./test/e2e -count=1 -timeout "$timeout" || fail=1
echo "== guest with cgroup v2"
go run ./test/guest -bin "$PWD/bin" -short || fail=1
[ $fail = 0 ] && echo "test: ok"
exit $fail
