#!/bin/bash
# demo.sh up|down: Berth with the sample application, in an instance of its own below
# $BERTH_DEMO_ROOT (default /var/lib/berth-demo). Shows that work outlives its managers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=$PWD
root=${BERTH_DEMO_ROOT:-/var/lib/berth-demo}
programs=$root/programs # a copy, so that the demo can upgrade them
export DOCKER_HOST=unix://$root/run/docker.sock DOCKER_CLI_HINTS=false BERTH_ROOT=$root

say() { printf '\n== %s\n' "$*"; }

if [ "$(id -u)" != 0 ]; then
	echo "demo: containers need root: sudo make demo" >&2
	exit 1
fi

down() {
	if [ -x "$programs/berth" ]; then
		"$programs/berth" down --root "$root" --containers stop
	fi
	rm -rf "$root"
	echo "the demo is gone: containers, images, volumes, networks and $root"
}

# free_port prints the first port from $1 on that nothing answers on.
free_port() {
	local port=$1
	while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
	echo "$port"
}

# now prints milliseconds.
now() { echo $(($(date +%s%N) / 1000000)); }

# answers waits until the page is there; it fails after 20 seconds.
answers() {
	local deadline=$(($(now) + 20000))
	until curl -sf -m 2 -o /dev/null "$1"; do
		if [ "$(now)" -gt "$deadline" ]; then
			echo "demo: $1 does not answer; see: docker compose logs, berth explain guestbook-front-1" >&2
			return 1
		fi
		sleep 0.02
	done
}

up() {
	hack/deps.sh demo
	eval "$(hack/tools.sh)"
	images=$(hack/images.sh)

	say "berth up --root $root"
	mkdir -p "$programs"
	for name in berth berthd berth-runner berth-holder berth-init; do
		cp "bin/$name" "$programs/$name.new" && mv "$programs/$name.new" "$programs/$name"
	done
	"$programs/berth" up --root "$root" >/dev/null

	say "docker load: images built here from Debian's packages and from source, no registry"
	for name in redis guestbook busybox; do docker load -q -i "$images/$name.tar"; done

	say "docker compose up: a web front in Go and its store, Redis"
	cd examples/guestbook
	if ! docker compose ps -q front 2>/dev/null | grep -q .; then
		GUESTBOOK_PORT=$(free_port "${GUESTBOOK_PORT:-8080}")
	else
		GUESTBOOK_PORT=$(docker compose port front 8080 | sed 's/.*://')
	fi
	export GUESTBOOK_PORT
	docker compose up -d --wait
	local url=http://127.0.0.1:$GUESTBOOK_PORT
	answers "$url/"
	curl -sf -o /dev/null -d 'name=Berth&text=The%20demo%20was%20here.' "$url/sign"
	echo "fetched $url/: $(curl -sf "$url/" | sed -n 's/.*<title>\(.*\)<\/title>.*/\1/p'), visit $(curl -sf "$url/visits")"

	say "kill -9 of the front: its restart policy brings it back"
	local front pid started
	front=$(docker compose ps -q front)
	pid=$(docker inspect -f '{{.State.Pid}}' "$front")
	started=$(now)
	kill -9 "$pid"
	until [ "$(docker inspect -f '{{.State.Pid}}' "$front")" != "$pid" ] && curl -sf -m 2 -o /dev/null "$url/"; do
		if [ $(($(now) - started)) -gt 20000 ]; then
			"$programs/berth" explain "$front" >&2
			exit 1
		fi
		sleep 0.02
	done
	echo "answers again after $(($(now) - started)) ms, restart $(docker inspect -f '{{.RestartCount}}' "$front")"

	say "upgrade of berthd under load: no request may fail"
	# The next version: the same source with another version stamped in.
	(cd "$repo" && go build -buildvcs=false -o "$programs/load" ./hack/load &&
		CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags "-s -w -X main.version=$("$programs/berthd" --version)+next" -o "$programs/berthd.new" ./cmd/berthd)
	"$programs/load" -for 6s -workers 4 "$url/visits" &
	local load=$!
	sleep 1
	mv "$programs/berthd.new" "$programs/berthd"
	"$programs/berth" up --root "$root" >/dev/null
	wait $load || { echo "demo: requests failed during the upgrade" >&2; exit 1; }
	docker compose ps

	cat <<-END

	== It runs.
	  the application   $url/
	  docker            export DOCKER_HOST=$DOCKER_HOST
	  compose           export DOCKER_CONFIG=$DOCKER_CONFIG   (then: cd examples/guestbook && docker compose ps)
	  berth             export BERTH_ROOT=$root PATH=$programs:\$PATH

	Try next:
	  berth ps                              what runs
	  berth explain guestbook-front-1       why it is as it is
	  docker run --rm -it busybox sh        a shell in a container
	  kill -9 \$(pgrep -f "berthd.*$root")   the daemon dies; the page does not
	  make demo-down                        every trace goes
	END
}

case ${1:-} in
up) up ;;
down) down ;;
*) echo "usage: demo.sh up|down" >&2; exit 2 ;;
esac
