#!/usr/bin/env bash
# Runs one benchmark after installing: tests/bench.sh ingest|adapt|loop|backlog|heads|score|growth|scale|quality [--json FILE] [options: --help]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    ingest | adapt | loop | backlog | heads | score | growth | scale | quality) ;;
    *)
        echo "usage: tests/bench.sh ingest|adapt|loop|backlog|heads|score|growth|scale|quality [--json FILE] [options; --help lists them]" >&2
        exit 2
        ;;
esac
deploy/install.sh
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # as `innerloop` has it
# A broker in production has run for long, and with Java's second compiler, which worker/servers/kafka.py leaves out.
export _JAVA_OPTIONS="${_JAVA_OPTIONS:--XX:TieredStopAtLevel=4}"
exec .venv/bin/python "tests/benchmarks/$1.py" "${@:2}"
