"""Measure how well a model predicts held-out text after a given training time, compared with other programs.

    python benchmarks/time_to_quality.py --data shakespeare_archive.zip --peer nanogpt=../nanoGPT
    python benchmarks/time_to_quality.py --data my_texts/ --seeds 1 --config my_config.yaml

The peers train with nanoGPT's published recipe for a CPU: a vocabulary of characters, 4 layers of width 128, context
length 64, and 2,000 updates of 12 sequences. nanoGPT runs its own train.py. transformers runs a plain loop with the
same settings. Atlas (`--config`) trains a vocabulary of `--vocabulary` tokens, prepares the text, and trains the model
for the time of the first peer. A second run of Atlas trains for an eighth of this time. Clocks start after the imports,
so the time to train the vocabulary, tokenize and save counts. The runs follow one another.

After the runs, the script evaluates all checkpoints in bits per byte on the same text, in windows of each model's
context length. This is the complete validation split, which Atlas holds out by document. The results are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import add_record_option, recorded

LAYERS, WIDTH, CONTEXT, BATCH, UPDATES, RATE = 4, 128, 64, 12, 2000, 1e-3
SAVE_EVERY = 250
ATLAS_SAVES_EVERY = 50  # larger updates
PART = 8
"""The peer's time divided by the time of Atlas's short run."""


@dataclass
class Run:
    """The result of a run: (seconds, bits per byte) at each checkpoint."""

    name: str
    seed: int
    curve: list[tuple[float, float]]

    @property
    def seconds(self) -> float:
        return self.curve[-1][0]

    @property
    def bits(self) -> float:
        return self.curve[-1][1]

    def reaches(self, bits: float) -> float | None:
        """Return the seconds until the run reaches `bits`, interpolated between checkpoints, or None if the run does
        not reach this value."""
        if self.curve[0][1] <= bits:
            return self.curve[0][0]
        for (t0, b0), (t1, b1) in itertools.pairwise(self.curve):
            if b1 <= bits:
                return t0 + (t1 - t0) * (b0 - bits) / (b0 - b1)
        return None


# The programs, each in a separate process and folder


def atlas(folder: Path, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    from atlas.process import set_up_process

    set_up_process()
    from atlas.cli import main
    from atlas.data import SequenceDataset, open_dataset
    from atlas.inference.load import load_model
    from atlas.training.checkpoint.manager import CheckpointManager
    from atlas.training.devices.device import setup_runtime
    from atlas.training.evaluate import evaluate
    from atlas.training.loss import SummedLoss

    start = time.monotonic()
    prepare = [
        "prepare",
        "--input",
        arguments.data,
        "--output",
        str(folder / "data"),
        "--val-fraction",
        "0.05",
    ]
    assert main([*prepare, "--train-tokenizer", str(arguments.vocabulary)]) == 0
    before = time.monotonic() - start
    options = {
        "checkpoint.output_dir": folder / "run",
        "checkpoint.save_interval": ATLAS_SAVES_EVERY,
        "checkpoint.keep_checkpoints": 1000,
        "training.eval_interval": 10**6,
        "training.eval_sequences": 16,  # evaluate only at the end; the script evaluates all checkpoints later
        "training.max_steps": "null",
        "training.max_hours": (arguments.seconds - before) / 3600,
        "seed": arguments.seed,
    }
    settings = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    train = ["train", "--config", arguments.config, "--train-data", str(folder / "data"), *settings]
    assert main(train) == 0
    spent = time.monotonic() - start
    val = open_dataset(folder / "data").split("val")
    assert val is not None
    curve = []
    for _, path in reversed(CheckpointManager(folder / "run").found()):
        if path.name == "atlas_best.pt":
            continue
        loaded = load_model(path)
        windows = SequenceDataset(val, loaded.config.model.max_seq_len, pad_last=True)
        runtime = setup_runtime(loaded.config.replace("training", precision="fp32"))
        result = evaluate(
            SummedLoss(loaded.model), windows, range(len(windows)), batch_size=16, runtime=runtime
        )
        assert result is not None
        curve.append((loaded.facts["seconds"], result.bits_per_byte))
    return [(spent - curve[-1][0] + seconds, bits) for seconds, bits in curve]


def nanogpt(folder: Path, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Run nanoGPT's own train.py, and keep its checkpoints under different names."""
    import numpy as np
    import torch

    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(arguments.peer_folder) / name, folder)
    ids = vocabulary(arguments)
    (folder / "data" / "text").mkdir(parents=True)
    for part in ("train", "val"):
        encoded = np.array([ids[char] for char in text_of(arguments, part)], dtype=np.uint16)
        encoded.tofile(folder / "data" / "text" / f"{part}.bin")
    with open(folder / "data" / "text" / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": len(ids)}, file)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    saved: list[tuple[float, Path]] = []
    write = torch.save

    def save(contents: Any, path: str) -> None:
        saved.append((time.monotonic() - start, folder / f"{len(saved)}.pt"))
        write(contents, saved[-1][1])

    torch.save = save
    sys.argv = ["train.py"] + [
        f"--{name}={value}"
        for name, value in {
            "dataset": "text",
            "device": "cpu",
            "compile": False,
            "eval_interval": SAVE_EVERY,
            "eval_iters": 1,
            "log_interval": SAVE_EVERY,
            "block_size": CONTEXT,
            "batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "n_layer": LAYERS,
            "n_head": LAYERS,
            "n_embd": WIDTH,
            "dropout": 0.0,
            "learning_rate": RATE,
            "min_lr": RATE / 10,
            "warmup_iters": 100,
            "beta2": 0.99,
            "max_iters": UPDATES,
            "lr_decay_iters": UPDATES,
        }.items()
    ]
    start = time.monotonic()
    # Replace the seed in the line that sets it.
    program = (
        (folder / "train.py").read_text().replace("manual_seed(1337", f"manual_seed({1337 + arguments.seed}")
    )
    (folder / "train.py").write_text(program)
    runpy.run_path(str(folder / "train.py"), run_name="__main__")
    from model import GPT, GPTConfig

    curve = []
    for seconds, path in saved:
        contents = torch.load(path, weights_only=True)
        model = GPT(GPTConfig(**contents["model_args"]))
        model.load_state_dict(contents["model"])
        model.eval()
        curve.append((seconds, bits_per_byte(arguments, lambda x, y, model=model: model(x, y)[0])))
    return curve


def transformers(folder: Path, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Train transformers' GPT-2 of the same shape in a plain loop with nanoGPT's settings."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = vocabulary(arguments)
    data = torch.tensor([ids[char] for char in text_of(arguments, "train")])
    torch.manual_seed(arguments.seed)
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": LAYERS, "n_positions": CONTEXT}
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(ids), **shape, **no_dropout))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
    )
    start, paused, curve = time.monotonic(), 0.0, []
    for step in range(UPDATES + 1):
        if step % SAVE_EVERY == 0:
            now = time.monotonic()
            model.eval()
            curve.append(
                (now - start - paused, bits_per_byte(arguments, lambda x, y: model(input_ids=x).logits))
            )
            model.train()
            paused += time.monotonic() - now
        progress = max(0, step - 100) / (UPDATES - 100)
        rate = (
            RATE * (step + 1) / 100
            if step < 100
            else RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        places = torch.randint(len(data) - CONTEXT - 1, (BATCH,)).tolist()
        rows = torch.stack([data[place : place + CONTEXT] for place in places])
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return curve


def text_of(arguments: argparse.Namespace, part: str) -> str:
    return Path(arguments.text, f"{part}.txt").read_text(encoding="utf-8")


def vocabulary(arguments: argparse.Namespace) -> dict[str, int]:
    """Return nanoGPT's vocabulary: all characters of the text."""
    chars = sorted(set(text_of(arguments, "train") + text_of(arguments, "val")))
    return {char: id for id, char in enumerate(chars)}


def bits_per_byte(arguments: argparse.Namespace, logits: Any) -> float:
    """Return the bits per byte of the full validation text, in consecutive windows."""
    import torch
    import torch.nn.functional as F

    text, ids = text_of(arguments, "val"), vocabulary(arguments)
    data = torch.tensor([ids[char] for char in text])
    total = 0.0
    with torch.no_grad():
        covered = (len(data) - 1) // CONTEXT * CONTEXT
        x, y = data[:covered].view(-1, CONTEXT), data[1 : covered + 1].view(-1, CONTEXT)
        for rows, targets in zip(x.split(256), y.split(256), strict=True):
            total += float(
                F.cross_entropy(logits(rows, targets).flatten(0, 1), targets.flatten(), reduction="sum")
            )
    return total / covered * len(data) / math.log(2) / len(text.encode())


PROGRAMS = {"atlas": atlas, "nanogpt": nanogpt, "transformers": transformers}


# All programs


def main() -> None:
    arguments = parse()
    if arguments.child:
        import torch._dynamo  # noqa: F401 - which the first step of any optimizer imports

        with tempfile.TemporaryDirectory(dir=arguments.text) as folder:
            curve = PROGRAMS[arguments.child](Path(folder), arguments)
        print("\n" + json.dumps(curve))
        return
    with tempfile.TemporaryDirectory() as folder, recorded("Time to quality", arguments):
        arguments.text = folder
        split_text(arguments.data, Path(folder))
        report(arguments, list(all_runs(arguments)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a text, folder or archive, as for atlas prepare")
    parser.add_argument("--peer", metavar="nanogpt=FOLDER", help="a checkout of nanoGPT")
    parser.add_argument("--config", default="modern-nano", help="what Atlas trains; default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=1024, help="size of Atlas's vocabulary")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE.png")
    for name in ("--child", "--text", "--seconds", "--seed", "--peer-folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    add_record_option(parser)
    arguments = parser.parse_args()
    arguments.seed = int(arguments.seed or 0)
    arguments.seconds = float(arguments.seconds or 0)
    if arguments.peer:
        name, _, arguments.peer_folder = arguments.peer.partition("=")
        if name != "nanogpt" or not Path(arguments.peer_folder, "train.py").is_file():
            parser.error(f"--peer {arguments.peer}: write nanogpt=FOLDER, with nanoGPT's train.py in it")
    return arguments


def split_text(data: str, folder: Path) -> None:
    """Write the training and validation parts as plain text, split by `atlas prepare`."""
    from atlas.data import open_dataset, prepare
    from atlas.tokenizer import Tokenizer

    dataset = prepare([data], folder / "split", val_fraction=0.05).dataset
    tokenizer = Tokenizer.load(folder / "split")
    for part in ("train", "val"):
        stream = open_dataset(dataset.folder).split(part)
        assert stream is not None
        ids = stream.read(0, stream.num_tokens).tolist()
        text = tokenizer.decode(ids).replace("<|endoftext|>", "\n")
        (folder / f"{part}.txt").write_text(text, encoding="utf-8")
        print(f"{part}: {len(text.encode()) / 1e6:.2f} MB")


def all_runs(arguments: argparse.Namespace) -> Sequence[Run]:
    runs = []
    for seed in range(arguments.seeds):
        peers = [*(["nanogpt"] if arguments.peer else []), "transformers"]
        for name in peers:
            runs.append(Run(name, seed, child(arguments, name, seed, 0)))
            tell(runs[-1])
        limit = runs[-len(peers)].seconds
        for part in (1, PART):
            name = "atlas" if part == 1 else f"atlas, 1/{part}"
            runs.append(Run(name, seed, child(arguments, "atlas", seed, limit / part)))
            tell(runs[-1])
    return runs


def tell(run: Run) -> None:
    print(f"seed {run.seed}  {run.name:<13} {run.seconds:7.1f} s  {run.bits:.4f} bits per byte", flush=True)


def child(arguments: argparse.Namespace, name: str, seed: int, seconds: float) -> list[tuple[float, float]]:
    command = [sys.executable, __file__, "--child", name, "--data", arguments.data, "--text", arguments.text]
    command += ["--seed", str(seed), "--seconds", str(seconds), "--config", arguments.config]
    command += ["--vocabulary", str(arguments.vocabulary), "--peer-folder", arguments.peer_folder or ""]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: ended with {done.returncode}; its own words are above")
    return [tuple(point) for point in json.loads(done.stdout.splitlines()[-1])]


def report(arguments: argparse.Namespace, runs: Sequence[Run]) -> None:
    names = list(dict.fromkeys(run.name for run in runs))
    medians = {}
    for name in names:
        ends = [(run.seconds, run.bits) for run in runs if run.name == name]
        medians[name] = [statistics.median(figures) for figures in zip(*ends, strict=True)]
    print(f"\n| median of {arguments.seeds} | seconds | bits per byte |\n|---|---:|---:|")
    for name, (seconds, bits) in medians.items():
        print(f"| {name} | {seconds:.1f} | {bits:.3f} |")
    peer = names[0]
    if arguments.plot:
        draw(Path(arguments.plot), runs)
    for name in names:
        if name.startswith("atlas"):
            time_ratio, bits_ratio = (
                ours / theirs for ours, theirs in zip(medians[name], medians[peer], strict=True)
            )
            print(f"{name}: {time_ratio:.3f} of {peer}'s time, {bits_ratio:.3f} of its bits per byte")
            there = [run.reaches(medians[peer][1]) for run in runs if run.name == name]
            print(f"{name}: at {peer}'s bits per byte after {', '.join(map(_seconds, there))}")


def _seconds(when: float | None) -> str:
    return "never" if when is None else f"{when:.1f} s"


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Draw every run as a line. All runs of a program have the same colour."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(run.name for run in runs))
    for run in runs:
        label = run.name if run.seed == 0 else None
        axes.plot(*zip(*run.curve, strict=True), color=f"C{names.index(run.name)}", label=label, marker=".")
    axes.set(xlabel="seconds", ylabel="bits per byte, validation", ylim=(None, 4.5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
