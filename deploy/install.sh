#!/usr/bin/env bash
# Makes .venv with the locked versions and installs this checkout into it. Safe to run again: an unchanged
# lock and pyproject.toml install nothing. INNERLOOP_TORCH=cpu takes the small CPU build of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly UV_VERSION=0.13.9
readonly LOCK=deploy/requirements.lock
readonly TORCH="${INNERLOOP_TORCH:-default}"
readonly PYTHON="${PYTHON:-python3}"

"$PYTHON" - <<'PY' || { echo "innerloop needs Python 3.11 or newer: set PYTHON to one" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY

# mypy and import-linter want one tree that is named as the packages are; worker/ and schemas/ lie outside src/.
tree=.venv/tree/innerloop
link_tree() {
    rm -rf "$tree" && mkdir -p "$tree"
    (cd "$tree" && ln -sfn ../../../src/innerloop/* ../../../worker ../../../schemas .)
}

stamp="$({ cat "$LOCK" pyproject.toml deploy/install.sh; echo "$TORCH"; pwd; } | "$PYTHON" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [ "$(cat .venv/innerloop.stamp 2>/dev/null || true)" = "$stamp" ]; then
    link_tree
    exit 0
fi

started=$SECONDS
rm -f .venv/innerloop.stamp
if [ ! -x .venv/bin/python ]; then
    echo "== making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
uv() { VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv "$@"; }

if [ "$TORCH" = cpu ]; then
    echo "== installing the locked versions, with the CPU build of torch"
    # The CPU build has hashes and a local version of its own, so it is taken by version, after the rest.
    locked="$(mktemp)"
    trap 'rm -f "$locked"' EXIT
    "$PYTHON" - "$LOCK" >"$locked" <<'PY'
import re, sys
blocks = re.split(r"\n(?=[a-z0-9])", open(sys.argv[1]).read())
print("\n".join(b for b in blocks if not re.match(r"(nvidia|cuda|torch|triton)[-\w]*==", b)))
PY
    uv pip install --quiet --require-hashes -r "$locked"
    uv pip install --quiet --torch-backend cpu "torch==$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$LOCK")"
else
    echo "== installing the locked versions from $LOCK"
    uv pip install --quiet --require-hashes -r "$LOCK"
fi
echo "== installing innerloop from this checkout"
uv pip install --quiet --no-deps --no-build-isolation --editable .
link_tree
echo "$stamp" >.venv/innerloop.stamp
echo "== installed in $((SECONDS - started)) s"
