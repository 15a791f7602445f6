#!/bin/bash
# deps.sh GROUP... makes sure that what a group of targets needs is on this machine.
#
# As root on Debian or Ubuntu it installs what is missing with apt; otherwise it names it in one
# line and fails. It calls apt only when something is missing. Groups: build demo test guest bench.
set -euo pipefail

missing=() # Debian packages

need() { # need PACKAGE TEST...: PACKAGE is missing when the test fails
	local package=$1
	shift
	"$@" >/dev/null 2>&1 || missing+=("$package")
}
have() { command -v "$1"; }
static() { [ -n "$(ls /usr/lib/*/"$1" /usr/lib/"$1" 2>/dev/null)" ]; }

for group in "$@"; do
	case $group in
	build)
		if ! command -v go >/dev/null; then
			echo "deps: Go is missing: install the version in go.mod or a later one from https://go.dev/dl/" >&2
			exit 1
		fi
		need gcc have gcc
		need libc6-dev static libc.a
		need pkg-config have pkg-config
		need libseccomp-dev static libseccomp.a
		need git have git
		;;
	demo | test)
		need iproute2 have ip
		need curl have curl
		need util-linux have nsenter
		;;
	guest)
		need qemu-system-x86 have qemu-system-x86_64
		;;
	bench)
		need iproute2 have ip
		need util-linux have unshare
		;;
	*)
		echo "deps: unknown group $group: use build, demo, test, guest or bench" >&2
		exit 2
		;;
	esac
done

[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "deps: missing: ${missing[*]}; install them (Debian and Ubuntu: sudo apt-get install ${missing[*]})" >&2
	exit 1
fi
echo "installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
# Services of new packages are not started: nothing here wants a second daemon on the host.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod +x $policy
fi
apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
	apt-get update -q >/dev/null
	apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}
