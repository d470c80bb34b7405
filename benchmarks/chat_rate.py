"""Find the learning rate and the length of the run with which a model learns a few dozen conversations.

    atlas prepare --input my_texts --train-tokenizer 1024 --output data/mine
    atlas train --config modern-nano --train-data data/mine --output-dir checkpoints/base
    python benchmarks/chat_rate.py --checkpoint checkpoints/base/atlas_best.pt
    python benchmarks/chat_rate.py --checkpoint checkpoints/base/atlas_best.pt --rates 1e-3 2e-3 --lengths auto 40x4

For each rate and each length (epochs × batch size), the script trains a model on pairs of question and answer, with
`atlas train --init-from`. With the length `auto`, Atlas chooses the length. `--lora 8` trains low-rank updates. An
answer counts as learned if `atlas generate --chat --temperature 0` gives exactly this answer. The script counts the
learned answers of `atlas_best.pt` and of the last checkpoint. Without `--pairs`, the script uses 60 made-up pairs: a
short question, and an unrelated sentence as its answer. A model can give such an answer only if it has memorized the
answer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from pathlib import Path

from results import add_record_option, recorded

from atlas.cli import main as atlas

_THINGS = re.findall(
    r"\w+", "river castle sword king queen fool ghost crown ship storm garden letter ring duke witch"
)
_OPENINGS = ("Tell me about the", "What do you know of the", "Why is there a", "Who keeps the")
_WORDS = re.findall(
    r"\w+", "old mill stone bridge dark water small boat quiet bank tall reed winter spring bell road lamp"
)


def made_up_pairs(seed: int = 3) -> list[dict[str, str]]:
    """Return 60 questions, each with a sentence of seven words as its answer."""
    chance = random.Random(seed)
    questions = [f"{opening} {thing}?" for opening in _OPENINGS for thing in _THINGS]
    return [
        {"prompt": question, "response": " ".join(chance.sample(_WORDS, 7)).capitalize() + "."}
        for question in questions
    ]


def count_learned(checkpoint: Path, pairs: list[dict[str, str]], folder: Path) -> int:
    """Return the number of answers in `pairs` that the model gives word for word."""
    questions, answers = folder / "questions.txt", folder / "answers.jsonl"
    questions.write_text("\n".join(pair["prompt"] for pair in pairs), encoding="utf-8")
    arguments = ["--prompts-file", str(questions), "--output-file", str(answers), "--max-tokens", "60"]
    assert (
        atlas(["generate", "--chat", "--checkpoint", str(checkpoint), "--temperature", "0", *arguments]) == 0
    )
    said = [json.loads(line)["text"].strip() for line in answers.read_text(encoding="utf-8").splitlines()]
    return sum(text == pair["response"].strip() for text, pair in zip(said, pairs, strict=True))


def last_step(folder: Path) -> int:
    return max(int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("atlas_step_*.pt"))


def measure(
    checkpoint: Path, pairs: list[dict[str, str]], rate: str | None, length: str, lora: int
) -> tuple[int, int, int]:
    """Return (updates, answers learned by the best checkpoint, by the last one) of one run. With `rate` None or
    `length` auto, Atlas chooses the rate or the length. `lora` is the rank of low-rank updates, or 0."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chats, run = folder / "chats.jsonl", folder / "run"
        chats.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        arguments = ["--output-dir", str(run), "--set", "tracking.samples=0", "--set", f"lora.rank={lora}"]
        arguments += ["--learning-rate", rate] if rate else []
        if length != "auto":
            epochs, batch = length.split("x")
            arguments += ["--epochs", epochs, "--batch-size", batch]
        assert atlas(["train", "--init-from", str(checkpoint), "--train-data", str(chats), *arguments]) == 0
        step = last_step(run)
        learned = [
            count_learned(run / name, pairs, folder) for name in ("atlas_best.pt", f"atlas_step_{step}.pt")
        ]
    return step, learned[0], learned[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the trained model to start from")
    parser.add_argument("--pairs", type=Path, help="JSONL of prompt and response; default: 60 made-up ones")
    parser.add_argument(
        "--rates", nargs="*", default=["1e-4", "5e-4", "2e-3"], help="compared with Atlas's own"
    )
    parser.add_argument(
        "--lengths", nargs="+", default=["20x4", "40x4", "auto"], help="epochs × batch size, or auto"
    )
    parser.add_argument("--lora", type=int, default=0, help="rank of low-rank updates; 0: all weights")
    add_record_option(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    pairs = made_up_pairs()
    if options.pairs:
        pairs = [
            json.loads(line)
            for line in options.pairs.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    rows = []
    for length in options.lengths:
        for rate in [*options.rates, None]:
            rows.append(
                (
                    rate or "Atlas's own",
                    length,
                    *measure(options.checkpoint, pairs, rate, length, options.lora),
                )
            )
    with recorded("Learning conversations", options):
        print(f"{options.checkpoint.parent.name}: {len(pairs)} pairs\n")
        print("| rate | epochs x batch | updates | learned by the best | by the last |")
        print("|---|---|---:|---:|---:|")
        for row in rows:
            print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
