#!/bin/bash
# deb.sh PACKAGE... unpacks Debian packages into the cache without installing them, and prints
# one directory per package: the root of its files. Keyed by version, so later calls are free.
set -euo pipefail
cache=${BERTH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/berth}/debs
mkdir -p "$cache"

candidate() { apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" {print $2}'; }

for package in "$@"; do
	version=$(candidate "$package")
	if [ -z "$version" ] && [ "$(id -u)" = 0 ]; then
		apt-get update -q >/dev/null
		version=$(candidate "$package")
	fi
	if [ -z "$version" ]; then
		echo "deb: package $package is not known to apt on this machine; run apt-get update as root, or use Debian 12 or later" >&2
		exit 1
	fi
	dir=$cache/${package}_${version//:/%}
	if [ ! -e "$dir" ]; then
		work=$(mktemp -d "$cache/.work-XXXXXX")
		trap 'rm -rf "$work"' EXIT
		chmod 755 "$work"
		fetch() { (cd "$work" && apt-get download -q -o APT::Sandbox::User=root "$package=$version" >/dev/null 2>"$work/log"); }
		if ! fetch; then # the lists may be older than the mirror
			[ "$(id -u)" != 0 ] || apt-get update -q >/dev/null
			version=$(candidate "$package")
			dir=$cache/${package}_${version//:/%}
			fetch || { cat "$work/log" >&2; exit 1; }
		fi
		mkdir "$work/root"
		dpkg-deb -x "$work"/*.deb "$work/root"
		rm -f "$work"/*.deb "$work/log"
		rm -rf "$dir"
		mv "$work/root" "$dir"
		rm -rf "$work"
		trap - EXIT
	fi
	echo "$dir"
done
