#!/usr/bin/env bash
# From text to a model that writes and a GGUF file, in the active environment, or else in a .venv that is made if need
# be. Everything given here goes to `atlas pipeline`:
#   ./scripts/run_pipeline.sh --data FOLDER_OR_FILE   on your text; on a terminal it asks what to train
#   ./scripts/run_pipeline.sh --demo                  on Python's own documentation, without a question
#   ./scripts/run_pipeline.sh --demo --data FILE      the same on your text
#   ./scripts/run_pipeline.sh                         on data/raw/archive.zip, or it asks for your text
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"

# Before minutes of installing: is there a text?
python=$(find_python)
chosen=$("$python" "$root/atlas/cli/choose_text.py" "$0" "$@")
[ -z "$chosen" ] || set -- "$@" "$chosen"

cd "$root"
prepare_venv llama,serve active
cd "$OLDPWD" # paths that are given are the caller's
exec "$venv_python" -m atlas pipeline "$@"
