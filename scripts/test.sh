#!/usr/bin/env bash
# Run all checks that a change must pass: ruff, mypy and pytest. The checks run in .venv, which the script makes if
# needed. The first failure ends the script. All arguments go to pytest:
#   ./scripts/test.sh               the default suite, one process per core, each file in one process
#   ./scripts/test.sh -m slow       the long tests
#   ./scripts/test.sh -k resume -x  some tests, up to the first failure
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1-}" = -- ] && shift
[ $# -gt 0 ] || set -- -n auto --dist loadfile

. scripts/venv.sh
prepare_venv dev

SECONDS=0
trap 'echo "scripts/test.sh: $SECONDS s after installation, exit $?" >&2' EXIT
# Hundreds of tests start a new Python process. With this variable, each process would compile the package again.
unset PYTHONDONTWRITEBYTECODE
run() {
  echo "+ $*" >&2
  "$venv_python" -m "$@"
}
run ruff check .
run ruff format --check .
run mypy
run pytest "$@"
