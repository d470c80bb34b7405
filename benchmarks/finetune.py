"""Compare fine-tuning in Atlas with transformers and PEFT: seconds per update, and peak memory.

    python benchmarks/finetune.py FOLDER
    python benchmarks/finetune.py FOLDER --context 512 --steps 20

FOLDER is a public model in Hugging Face's format. Both programs train on the same tokens, one sequence per update, once
all weights and once low-rank updates of every matrix in the blocks (rank 8). The peer is a plain loop: the model's own
loss, PyTorch's fused AdamW and gradient clipping. Each row is a separate process. Atlas saves a checkpoint at the end,
and holds a copy of its state for this in memory; the peer saves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import add_record_option, recorded

from atlas.cli import main as atlas

RANK = 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SKIPPED = 3


def of_atlas(options: argparse.Namespace, folder: Path) -> list[float]:
    """Return the seconds of each update of `atlas train`."""
    (folder / "text.txt").write_text("The river runs past the old mill. " * 20_000, encoding="utf-8")
    assert atlas(["import", options.model, "--output-dir", str(folder / "in")]) == 0
    settings = [
        f"lora.rank={RANK if options.child == 'lora' else 0}",
        f"model.max_seq_len={options.context}",
        "training.precision=fp32",
        "training.log_interval=1",
        "tracking.samples=0",
        "data.val_fraction=0",
    ]
    arguments = ["--max-steps", str(options.steps), "--batch-size", "1", "--device", "cpu"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    paths = ["--train-data", str(folder / "text.txt"), "--output-dir", str(folder / "run")]
    assert atlas(["train", "--init-from", str(folder / "in/atlas_best.pt"), *paths, *arguments]) == 0
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [1 / line["steps_per_second"] for line in lines if line.get("steps_per_second")]


def of_peer(options: argparse.Namespace, folder: Path) -> list[float]:
    """Return the seconds of each update of a loop around the model of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.child == "lora":
        import peft

        low_rank = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(MODULES), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, low_rank)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(1000, (1, options.context))
    seconds = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    return seconds


def measured(program: str, kind: str, options: argparse.Namespace) -> tuple[float, float]:
    """Return the median seconds per update and the peak memory in GB of one process."""
    sizes = ["--context", str(options.context), "--steps", str(options.steps)]
    command = [sys.executable, __file__, options.model, *sizes, "--program", program, "--child", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder in Hugging Face's format")
    parser.add_argument("--context", type=int, default=256, help="tokens per update")
    parser.add_argument("--steps", type=int, default=12, help="updates; the first three are not counted")
    parser.add_argument("--program", choices=("atlas", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("lora", "all"), help=argparse.SUPPRESS)
    add_record_option(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.child:
        run = of_atlas if options.program == "atlas" else of_peer
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            seconds = run(options, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps([statistics.median(seconds[_SKIPPED:]), peak]))
        return
    with recorded("Fine-tuning", options):
        print(f"{Path(options.model).name}, 1 x {options.context} tokens per update, fp32\n")
        print("| trained | program | s/update | of the peer's | peak GB |")
        print("|---|---|---:|---:|---:|")
        for kind, peer in (("lora", "PEFT"), ("all", "transformers")):
            theirs, their_peak = measured("peer", kind, options)
            ours, our_peak = measured("atlas", kind, options)
            name = f"LoRA, rank {RANK}" if kind == "lora" else "all weights"
            print(f"| {name} | Atlas | {ours:.2f} | {ours / theirs:.2f} | {our_peak:.2f} |")
            print(f"| | {peer} | {theirs:.2f} | | {their_peak:.2f} |")


if __name__ == "__main__":
    main()
