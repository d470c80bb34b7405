#!/usr/bin/env bash
# Run the GPU tests and benchmarks in one call, without a network: see `benchmarks/gpu.sh --help`. The environment
# variable PYTHON names the Python to use; the default is python3.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
export PYTHONPATH=$here:$here/benchmarks${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m gpu "$@"
