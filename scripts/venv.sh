# Functions for the other scripts, which source this file. In the repository's root, `prepare_venv EXTRAS` installs Atlas
# with these extras into .venv, and sets $venv_python to the path of the Python in .venv. `prepare_venv EXTRAS active` uses
# the active environment instead, if there is one. `prepare_venv` is quick if nothing has changed since its last call.

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

# Print the path of the Python in an environment's folder, if it is new enough and can install packages.
python_of() {
  local candidate
  for candidate in "$1/bin/python" "$1/Scripts/python.exe" "$1/python.exe"; do
    if "$candidate" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# Print the folder of the active environment. Conda's base environment is shared, so it does not count.
active_environment() {
  if [ -n "${VIRTUAL_ENV-}" ]; then
    echo "$VIRTUAL_ENV"
  elif [ -n "${CONDA_PREFIX-}" ] && [ "${CONDA_DEFAULT_ENV-base}" != base ]; then
    echo "$CONDA_PREFIX"
  fi
}

prepare_venv() {
  local extras=$1 environment="$PWD/.venv" active=""
  [ "${2-}" = active ] && active=$(active_environment)
  if [ -n "$active" ] && python_of "$active" >/dev/null; then
    environment=$active
    echo "using the active environment $environment" >&2
  elif [ -n "$active" ]; then
    echo "the active environment $active has no pip, or a Python older than 3.10: using .venv instead" >&2
  fi
  if ! venv_python=$(python_of "$environment"); then
    local python
    python=$(find_python)
    echo "making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv
    venv_python=$(python_of "$environment") ||
      { echo "error: .venv has no working Python and pip: remove it and try again" >&2; return 1; }
  fi
  local stamp="$environment/atlas-installed-$extras.txt"
  # Compare the folder too: the environment may contain the Atlas of another clone.
  if ! { pwd; cat pyproject.toml requirements.txt; } | cmp -s - "$stamp"; then
    echo "installing Atlas and the missing packages into $environment (PyTorch takes minutes)" >&2
    rm -f "$stamp"
    # Install the pinned PyTorch first: pip resolves all other packages against it.
    "$venv_python" -m pip install --quiet --disable-pip-version-check --no-input -r requirements.txt
    "$venv_python" -m pip install --quiet --disable-pip-version-check --no-input -e ".[$extras]"
    { pwd; cat pyproject.toml requirements.txt; } >"$stamp"
  fi
}
