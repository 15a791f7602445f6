#!/bin/bash
# tools.sh finds or builds the clients that tests and the demo use, and prints what to put into
# the environment: PATH and DOCKER_CONFIG. Nothing is installed on the host and no daemon comes
# along: the docker client is the machine's own, or taken out of Debian's package; the Compose
# plugin is the machine's own (v2 or later), or built from its module (about 3 minutes, once).
set -euo pipefail
cache=${BERTH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/berth}/tools
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
compose_version=v2.40.3
mkdir -p "$cache/bin" "$cache/docker-config/cli-plugins"
export DOCKER_CONFIG=$cache/docker-config PATH=$PATH:$cache/bin

if ! command -v docker >/dev/null; then
	dir=$("$here/deb.sh" docker.io)
	ln -sf "$dir/usr/bin/docker" "$cache/bin/docker"
fi

# The registry that scripts push to and pull from; only its program, not its service.
if ! command -v docker-registry >/dev/null; then
	dir=$("$here/deb.sh" docker-registry)
	ln -sf "$dir/usr/bin/docker-registry" "$cache/bin/docker-registry"
fi

plugin=$DOCKER_CONFIG/cli-plugins/docker-compose
built=$cache/compose/$compose_version/docker-compose
if [ ! -x "$built" ] && ! docker compose version --short 2>/dev/null | grep -Eq '^v?([2-9]|[1-9][0-9])\.'; then
	echo "building docker compose $compose_version" >&2
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	# A module of its own: Compose needs other versions of BuildKit's modules than Berth does.
	cd "$work"
	go mod init composebuild >/dev/null 2>&1
	GOFLAGS=-mod=mod go get "github.com/docker/compose/v2/cmd@$compose_version" >/dev/null 2>&1
	mkdir -p "$(dirname "$built")"
	GOFLAGS=-mod=mod CGO_ENABLED=0 go build -trimpath \
		-ldflags "-s -w -X github.com/docker/compose/v2/internal.Version=$compose_version" \
		-o "$built.new" github.com/docker/compose/v2/cmd
	mv "$built.new" "$built"
fi
if [ -x "$built" ]; then
	ln -sf "$built" "$plugin"
fi

echo "export PATH=\"\$PATH:$cache/bin\" DOCKER_CONFIG=\"$DOCKER_CONFIG\""
