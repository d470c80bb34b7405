#!/usr/bin/env bash
# Make a trained model and a GGUF file from text. The script uses the active Python environment. Without an active one,
# it uses .venv, and makes .venv if needed. All arguments go to `atlas pipeline`:
#   ./scripts/run_pipeline.sh --data FOLDER_OR_FILE   on your text; on a terminal, the script asks for a preset
#   ./scripts/run_pipeline.sh --demo                  on Python's own documentation, without a question
#   ./scripts/run_pipeline.sh --demo --data FILE      the same on your text
#   ./scripts/run_pipeline.sh                         on data/raw/archive.zip; without it, the script asks for your text
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"

# Look for a text first, since the installation takes minutes.
python=$(find_python)
chosen=$("$python" "$root/atlas/cli/choose_text.py" "$0" "$@")
[ -z "$chosen" ] || set -- "$@" "$chosen"

cd "$root"
prepare_venv llama,serve active
cd "$OLDPWD" # so that relative paths start at the caller's folder
exec "$venv_python" -m atlas pipeline "$@"
