# Sourced from the repository root: `. scripts/venv.sh EXTRA` leaves Atlas installed with that extra in .venv,
# and the environment's Python in $venv_python. Quick when nothing has changed since the last time.

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer on PATH: install one (https://www.python.org/downloads/), or name it in PYTHON" >&2
  return 1
}

venv_has_python() {
  venv_python=.venv/bin/python
  [ -d .venv/Scripts ] && venv_python=.venv/Scripts/python.exe # Git Bash on Windows
  "$venv_python" -c 'import pip' >/dev/null 2>&1
}

prepare_venv() {
  local extra=$1 stamp=.venv/installed-$1.txt
  if ! venv_has_python; then
    local python
    python=$(find_python)
    echo "making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv
    venv_has_python || { echo "error: .venv has no working Python and pip: remove it and try again" >&2; return 1; }
  fi
  if ! cat pyproject.toml requirements.txt | cmp -s - "$stamp"; then
    echo "installing Atlas and what it needs into .venv (PyTorch is large: this takes minutes)" >&2
    rm -f "$stamp"
    # First the pin: it decides which PyTorch everything else is resolved against.
    "$venv_python" -m pip install --quiet --disable-pip-version-check --no-input -r requirements.txt
    "$venv_python" -m pip install --quiet --disable-pip-version-check --no-input -e ".[$extra]"
    cat pyproject.toml requirements.txt >"$stamp"
  fi
}

prepare_venv "$1"
