#!/usr/bin/env bash
# Installs into .venv if need be, then lint, types and every test. Arguments go to pytest: tests/run.sh -k ledger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
deploy/install.sh
bin=.venv/bin
echo "== lint"
$bin/ruff check .
$bin/ruff format --check .
PYTHONPATH=.venv/tree $bin/lint-imports --no-logo
echo "== types"
$bin/mypy
echo "== tests"
$bin/pytest "$@"
