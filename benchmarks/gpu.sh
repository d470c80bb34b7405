#!/usr/bin/env bash
# Everything here that concerns a GPU, in one command and at most nine minutes, without network.
#
#     benchmarks/gpu.sh
#     NANOGPT=../nanoGPT OUT=results PYTHON=python3 BATCH_SIZE=16 benchmarks/gpu.sh
#
# Needs a CUDA device, PyTorch 2.10 or newer and what Atlas itself needs; pytest, transformers, nanoGPT and xllamacpp are
# left out where they are not. What each step printed is in $OUT (default: gpu-results), a file a step, and how they
# ended in $OUT/summary.txt. A step that fails or takes too long does not keep the others from running; the exit status
# is that of the worst.
#
# The tests are first, since figures of what is wrong say nothing; then training's speed and memory, what it costs to be
# in one shard under torchrun, then decoding.

set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-gpu-results}
python=${PYTHON:-python}
batch_size=${BATCH_SIZE:-8}
budget=530 # seconds for all steps: nine minutes, less what ending takes

mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd) || exit 1
summary=$out/summary.txt
: >"$summary"
worst=0

# Relative folders are the caller's.
nanogpt=
if [ -n "${NANOGPT:-}" ]; then
    nanogpt=$(cd "$NANOGPT" && pwd) || exit 1
fi
case $python in
*/*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;;
esac

cd "$here" || exit 1
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 # what was printed before the time was over is kept
export HF_HUB_OFFLINE=1
SECONDS=0

say() {
    printf '%s\n' "$*" | tee -a "$summary"
}

# step NAME SECONDS COMMAND...: run it for at most so long, and never past the budget.
step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) begun=$SECONDS status word
    shift 2
    if [ "$left" -lt 10 ]; then
        say "$name: not run, the time is over"
        worst=1
        return
    fi
    if [ "$limit" -gt "$left" ]; then
        limit=$left
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    case $status in
    0) word=done ;;
    124 | 137) word="stopped after $limit s" ;;
    *) word="FAILED with $status" ;;
    esac
    if [ "$status" -ne 0 ]; then
        worst=1
    fi
    say "$name: $word in $((SECONDS - begun)) s"
    tail -n 30 "$out/$name.txt"
}

has() {
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

if ! "$python" -c '
import sys
import torch

found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
if found < (2, 10):
    sys.exit("error: PyTorch 2.10 or newer is needed")
if not torch.cuda.is_available():
    sys.exit("error: this PyTorch sees no CUDA device")
print(torch.cuda.get_device_name(), f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB")
' 2>&1 | tee -a "$summary"; then
    exit 1
fi

peers=()
if [ -n "$nanogpt" ]; then
    peers=(--peer "nanoGPT=$nanogpt")
else
    say "nanoGPT: NANOGPT names no folder, left out"
fi
for package in transformers xllamacpp; do
    has "$package" || say "$package: is not installed, left out"
done

if has pytest; then
    # The files that have such tests: the others may import what is not installed.
    mapfile -t files < <(grep -l 'mark\.gpu' tests/*.py)
    step tests 130 "$python" -m pytest -m gpu -q -p no:cacheprovider "${files[@]}"
else
    say "tests: pytest is not installed, left out"
fi
step train_throughput 210 "$python" benchmarks/train_throughput.py --device cuda --preset small \
    --batch-size "$batch_size" --rounds 20 ${peers[@]+"${peers[@]}"}
step memory 140 "$python" benchmarks/memory.py --device cuda --no-peers
step one_shard 60 "$python" benchmarks/scaling.py --device cuda --preset small --processes 1 --parallel fsdp \
    --batch-size "$batch_size" --rounds 10 --updates 10
step decode 100 "$python" benchmarks/decode.py --device cuda --preset small --rounds 3

say "all in $SECONDS s; what each printed is in $(basename "$out")/"
exit "$worst"
