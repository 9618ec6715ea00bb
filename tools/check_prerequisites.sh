#!/bin/sh
# Checks what a fresh machine needs before the Makefile does anything; each lack gets its remedy in one sentence.
# Usage: check_prerequisites.sh PYTHON
set -u
python=$1
lacking=0
lack() {
    echo "make: $*" >&2
    lacking=1
}

[ "$(uname -s)" = Linux ] || echo "make: Lloom is tested on Linux only; on $(uname -s) some things may not work." >&2
if ! command -v "$python" >/dev/null 2>&1; then
    lack "$python is missing: install Python 3.11, 3.12 or 3.13 (Debian, Ubuntu: apt-get install python3 python3-venv), or name one with 'make PYTHON=/path/to/python3.12'."
    exit 1
fi
if ! "$python" -c '' 2>/dev/null; then
    lack "$python does not run: name another one with 'make PYTHON=/path/to/python3.12'."
    exit 1
elif ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    lack "$python is $("$python" -c 'import platform; print(platform.python_version())'), and Lloom needs 3.11, 3.12 or 3.13: name another one with 'make PYTHON=/path/to/python3.12'."
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    lack "$python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)."
fi
if ! "$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null && [ "$(uname -s)" = Linux ]; then
    lack "the system library libgomp.so.1 is missing, which the embedded LLM needs: install it (Debian, Ubuntu: apt-get install libgomp1)."
fi
exit $lacking
