#!/usr/bin/env bash
# Installs into .venv if need be and runs the demo with the options given: deploy/demo.sh --seconds 60
set -euo pipefail
"$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/innerloop" demo "$@"
