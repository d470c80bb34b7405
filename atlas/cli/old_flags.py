"""The options of Atlas 1.x's scripts that Atlas no longer has, with their replacements.

`docs/MIGRATING.md` shows the same table.
"""

from __future__ import annotations

_OVERRIDE = "write --set KEY=VALUE"

OLD_FLAGS = {
    "train": {
        "--log-interval": "write --set training.log_interval=N",
        "--override": _OVERRIDE,
    },
    "generate": {
        "--max-new-tokens": "write --max-tokens N",
        "--do-sample": "leave it out: Atlas samples by default, and --temperature 0 always takes the likeliest token",
        "--show-prompt": "leave it out: Atlas always prints the prompt before its completion",
        "--separator": "leave it out: an empty line separates completions, and --output-file writes JSON lines",
    },
    "export": {
        "--quantization": "write --quantize",
        "--tokenizer": "leave it out: the checkpoint contains its tokenizer",
    },
    "pipeline": {"--override": _OVERRIDE},
    "plan": {
        "--override": _OVERRIDE,
        "--train-data": "write --data FOLDER, a prepared dataset",
        "--val-data": "leave it out: evaluation is part of the estimate",
        "--num-epochs": "write --set training.epochs=N",
        "--benchmark-steps": "leave it out: the estimate needs no training steps",
        "--warmup-steps": "leave it out: the estimate needs no training steps",
        "--save-interval": "write --set checkpoint.save_interval=N",
        "--eval-interval": "write --set training.eval_interval=N",
        "--device": "write --set device=cpu, or --gpu NAME for another machine's card",
        "--output": "write --json > FILE",
    },
}
"""Command → old option → its replacement, as the last part of the error message."""
