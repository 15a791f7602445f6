#!/bin/bash
# images.sh builds the image archives busybox.tar, redis.tar and guestbook.tar into the cache and
# prints their directory. Reproducible; a set is kept per content of what goes into it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${BERTH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/berth}/images
mkdir -p "$cache"

front=$cache/guestbook-front
CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags '-s -w' -o "$front" ./examples/guestbook/front
debs=$(hack/deb.sh busybox-static redis-tools libc6)
key=$( (echo "$debs"; cat hack/mkimage/*.go "$front") | sha256sum | cut -c1-16)
if [ ! -e "$cache/$key/.complete" ]; then
	echo "building images" >&2
	mkdir -p "$cache/$key"
	go run ./hack/mkimage -out "$cache/$key" -deb hack/deb.sh -guestbook "$front" busybox redis guestbook
	touch "$cache/$key/.complete"
fi
ln -sfn "$key" "$cache/current"
echo "$cache/$key"
