"""Check whether two versions of Atlas compute exactly the same numbers, bit for bit.

    python benchmarks/same_bits.py BEFORE AFTER

BEFORE and AFTER are folders, each with a copy of the repository. Both versions train five small configs for 60 updates
on this machine. The script kills each run in between (`kill -9`) and resumes it. Then the script compares the losses,
the weights, the optimizer state, greedy text of 200 tokens, and the tensors of a GGUF file. Finally, AFTER reads the
dataset and resumes from the checkpoint that BEFORE wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml

UPDATES, KILLED_AFTER, TOKENS = 60, 25, 200
MODEL = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_seq_len": 64}
MODERN = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": True,
    "num_kv_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Muon, accumulated": {
        "model": MODERN,
        "training": {"optimizer": "muon", "gradient_accumulation_steps": 3},
    },
    "dropout, uneven micro-batches": {"model": {"dropout": 0.2}, "training": {"micro_batch_size": 3}},
    "best-fit packing, document masks": {"data": {"packing": "best_fit", "document_mask": True}},
    "LoRA": {"lora": {"rank": 4}},
}


def atlas(tree: Path, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    """Start `atlas ARGUMENTS` of a version, with two threads."""
    variables = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "atlas", *arguments]
    return subprocess.Popen(command, env=variables, cwd=tree, text=True, **how)


def run(tree: Path, *arguments: str) -> str:
    """Return the standard output of `atlas ARGUMENTS`."""
    process = atlas(tree, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, process.args))}: exit {process.returncode}\n{error}")
    return out


def losses(folder: Path) -> list[Any]:
    """Return the figures of a run's log that do not depend on time, for every line."""
    log = folder / "metrics.jsonl"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    figures = ("kind", "step", "loss", "val_loss", "grad_norm", "learning_rate")
    return [[line.get(key) for key in figures] for line in lines if line["kind"] in ("train", "validation")]


def train(tree: Path, config: Path, folder: Path, *arguments: str) -> None:
    """Train to the end. The run is killed once after some updates, and resumed."""
    command = ("train", "--config", str(config), "--output-dir", str(folder))
    process = atlas(tree, *command, *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(losses(folder)) < KILLED_AFTER:
        time.sleep(0.01)
    process.kill()
    process.wait()
    run(tree, *command, "--resume", "auto")


def facts(
    tree: Path, data: Path, folder: Path, settings: dict[str, Any], base: Path | None
) -> dict[str, Any]:
    """Return all values to compare, for one version and one config."""
    config: dict[str, Any] = {
        "device": "cpu",
        "seed": 7,
        "model": {**MODEL, **settings.get("model", {})},
        "data": {"train_data": str(data), **settings.get("data", {})},
        "training": {
            "batch_size": 4,
            "max_steps": UPDATES,
            "warmup_steps": 5,
            "log_interval": 1,
            "eval_interval": 20,
            "learning_rate": 3e-3,
            **settings.get("training", {}),
        },
        "checkpoint": {"save_interval": 10},
        "tracking": {"samples": 0},
        **({"lora": settings["lora"]} if "lora" in settings else {}),
    }
    folder.mkdir(parents=True)
    path = folder / "config.in.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    train(tree, path, folder / "run", *(["--init-from", str(base)] if base else []))
    last = folder / "run" / f"atlas_step_{UPDATES}.pt"
    contents = torch.load(last, weights_only=True, map_location="cpu")
    run(tree, "export", "--checkpoint", str(last), "--output", str(folder / "model.gguf"), "--no-verify")
    prompt = ("--prompt", "The", "--max-tokens", str(TOKENS), "--temperature", "0")
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    return {
        "losses": losses(folder / "run"),
        "weights": contents["model_state_dict"],
        "optimizer state": contents["optimizer_state_dict"],
        "greedy text": run(tree, "generate", "--checkpoint", str(last), *prompt),
        "GGUF tensors": {tensor.name: np.array(tensor.data) for tensor in tensors},
    }


def equal(one: Any, other: Any) -> bool:
    """Whether two values are equal bit for bit, in nested dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return bool(one == other)


def main() -> None:
    """Compare the versions and print a line per comparison. Exit with 1 if anything differs."""
    trees = {"before": Path(sys.argv[1]).resolve(), "after": Path(sys.argv[2]).resolve()}
    is_equal = True

    def compare(what: str, one: Any, other: Any) -> None:
        nonlocal is_equal
        same = equal(one, other)
        is_equal &= same
        print(f"{what}: {'equal' if same else 'DIFFER'}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["ATLAS_CACHE_DIR"] = str(place / "cache")
        text = place / "text.txt"
        pages = sorted((trees["before"] / "docs").glob("*.md"))
        text.write_text("\n\n".join(page.read_text(encoding="utf-8") for page in pages), encoding="utf-8")
        for side, tree in trees.items():
            target = ("--output", str(place / side), "--train-tokenizer", "600")
            run(tree, "prepare", "--input", str(text), *target)
        shards = [[path.read_bytes() for path in sorted((place / side).glob("*.npy"))] for side in trees]
        compare("dataset", *shards)
        for label, settings in CONFIGS.items():
            found = []
            for side, tree in trees.items():
                base = place / f"{side}-AdamW/run/atlas_step_{UPDATES}.pt" if "lora" in settings else None
                found.append(facts(tree, place / "before", place / f"{side}-{label}", settings, base))
            for key in found[0]:
                compare(f"{label}: {key}", found[0][key], found[1][key])
        old = place / f"before-AdamW/run/atlas_step_{UPDATES}.pt"
        run(trees["after"], "train", "--resume", str(old), "--max-steps", str(UPDATES + 5))
        print("a checkpoint written before is resumed after, on a dataset prepared before")
    sys.exit(not is_equal)


if __name__ == "__main__":
    main()
