#!/usr/bin/env bash
# Installs into .venv if need be, then lint, known vulnerabilities, types and every test. Arguments go to pytest:
#     tests/run.sh -k ledger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
deploy/install.sh
bin=.venv/bin

# Debian packages with which some tests look at the product from outside, installed once and only where that may be. A
# test that misses one is named at the end as not run.
install_packages() {
    local wanted=() policy=/usr/sbin/policy-rc.d log denied=
    command -v promtool >/dev/null || wanted+=(prometheus)
    command -v kcat >/dev/null || wanted+=(kcat)
    command -v chromium >/dev/null || wanted+=(chromium)
    if [ "${#wanted[@]}" = 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
    echo "== installing ${wanted[*]}"
    log="$(mktemp)"
    if [ ! -e "$policy" ]; then # else the package would start its server
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && denied=1
    fi
    get() { DEBIAN_FRONTEND=noninteractive timeout 300 apt-get "$@" >"$log" 2>&1 </dev/null; }
    if ! get install -y --no-install-recommends "${wanted[@]}"; then # a list that is old or missing
        { get update && get install -y --no-install-recommends "${wanted[@]}"; } ||
            echo "== not installed, the tests that need them will not run: $(tail -n 1 "$log")"
    fi
    if [ "$denied" ]; then rm -f "$policy"; fi
    rm -f "$log"
}
install_packages

echo "== lint"
$bin/ruff check .
$bin/ruff format --check .
PYTHONPATH=.venv/tree $bin/lint-imports --no-logo
echo "== known vulnerabilities"
# Told, not judged: whether the tests pass must not depend on what was published overnight. audit.sh by itself fails.
code=0
found="$(deploy/audit.sh 2>&1)" || code=$?
case "$code" in
0) ;;
3) echo "not checked: the advisory service cannot be asked from here" ;;
*) echo "$found" ;;
esac
echo "== types"
$bin/mypy
echo "== tests (how the console looks is left in ${SCREENSHOTS:=$PWD/build/screenshots})"
export SCREENSHOTS
# The tests share the cores with the servers they start, and torch's threads would spin for them: 71 s against 168 s of
# processor time for the stream's tests on two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
$bin/pytest --no-fold-skipped "$@"
