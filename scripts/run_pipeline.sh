#!/usr/bin/env bash
# The whole road from text to a GGUF file, in a .venv that is made if need be. Everything given here goes to
# `atlas pipeline`:
#   ./scripts/run_pipeline.sh --demo               on Python's own documentation, without a question
#   ./scripts/run_pipeline.sh --demo --data FILE   the same on your text
#   ./scripts/run_pipeline.sh                      on data/raw/archive.zip, asking what to train
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. scripts/venv.sh llama
cd "$OLDPWD" # paths that are given are the caller's
exec "$root/$venv_python" -m atlas pipeline "$@"
