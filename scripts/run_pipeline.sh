#!/usr/bin/env bash
# From text to a trained model and a GGUF file. It runs in the active environment, or else in a .venv, which it makes if
# needed. All arguments go to `atlas pipeline`:
#   ./scripts/run_pipeline.sh --data FOLDER_OR_FILE   on your text; on a terminal it asks what to train
#   ./scripts/run_pipeline.sh --demo                  on Python's own documentation, without a question
#   ./scripts/run_pipeline.sh --demo --data FILE      the same on your text
#   ./scripts/run_pipeline.sh                         on data/raw/archive.zip, or it asks for your text
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"

# Check for a text before minutes of installing.
python=$(find_python)
chosen=$("$python" "$root/atlas/cli/choose_text.py" "$0" "$@")
[ -z "$chosen" ] || set -- "$@" "$chosen"

cd "$root"
prepare_venv llama,serve active
cd "$OLDPWD" # relative paths are relative to the caller's folder
exec "$venv_python" -m atlas pipeline "$@"
