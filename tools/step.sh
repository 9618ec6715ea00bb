#!/bin/sh
# Runs a command quietly behind one line: step.sh "Installing packages" pip install ...
# On a terminal the line counts the seconds; on failure the command's output and its exit status come out.
set -u
title=$1
shift
log=$(mktemp "${TMPDIR:-/tmp}/lloom-step.XXXXXX") || exit 1
began=$(date +%s)
"$@" >"$log" 2>&1 &
pid=$!
trap 'kill -TERM $pid 2>/dev/null; wait $pid; rm -f "$log"; exit 130' INT TERM HUP
if [ -t 2 ]; then
    while kill -0 $pid 2>/dev/null; do
        printf '\r%s ... %s s' "$title" $(($(date +%s) - began)) >&2
        sleep 1
    done
    printf '\r' >&2
fi
wait $pid
status=$?
printf '%s: %s s\n' "$title" $(($(date +%s) - began)) >&2
[ $status -eq 0 ] || { cat "$log" >&2; printf '%s: failed.\n' "$title" >&2; }
rm -f "$log"
exit $status
