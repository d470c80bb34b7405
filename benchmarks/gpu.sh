#!/usr/bin/env bash
# The GPU tests and benchmarks in one call, without a network: `benchmarks/gpu.sh --help`. PYTHON names the interpreter.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
export PYTHONPATH=$here:$here/benchmarks${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m gpu "$@"
