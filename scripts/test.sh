#!/usr/bin/env bash
# Everything that must hold before a change is merged: ruff, types, tests, in a .venv that is made if need be.
# The first failure ends it. What is given here goes to pytest:
#   ./scripts/test.sh               the default suite, a process a core
#   ./scripts/test.sh -m slow       the long tests
#   ./scripts/test.sh -k resume -x  some tests, up to the first failure
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1-}" = -- ] && shift
[ $# -gt 0 ] || set -- -n auto

. scripts/venv.sh
prepare_venv dev

SECONDS=0
trap 'echo "scripts/test.sh: $SECONDS s after installation, exit $?" >&2' EXIT
# Hundreds of tests start a Python of their own, which would compile the package anew each time.
unset PYTHONDONTWRITEBYTECODE
run() {
  echo "+ $*" >&2
  "$venv_python" -m "$@"
}
run ruff check .
run ruff format --check .
run mypy
run pytest "$@"
