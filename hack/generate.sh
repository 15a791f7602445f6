#!/bin/bash
# generate.sh refreshes what is generated and committed: the modules each executable links.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p docs/deps
for dir in cmd/*/; do
	name=$(basename "$dir")
	tags="" cgo=0
	if [ "$name" = berth-runner ]; then tags="runc_nocriu seccomp netgo osusergo" cgo=1; fi
	{
		echo "# Modules that $name links, from go list -deps; refresh with make generate."
		CGO_ENABLED=$cgo GOOS=linux GOARCH=amd64 go list -tags "$tags" -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}' "./$dir" | sort -u | sed '/^$/d'
	} >"docs/deps/$name.txt.new"
	mv "docs/deps/$name.txt.new" "docs/deps/$name.txt"
done
