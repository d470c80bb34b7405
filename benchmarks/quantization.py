"""Measure a model's size, speed and bits per byte in llama.cpp, for each type of `atlas export --quantize`.

    python benchmarks/quantization.py --checkpoint checkpoints/atlas_best.pt --data data/processed/wikipedia
    python benchmarks/quantization.py --checkpoint checkpoints/atlas_best.pt --data held_out.txt --tokens 20000

The script exports the checkpoint in each type. llama.cpp (package `xllamacpp`) then generates one text greedily with
each file, on the CPU. Each file has a separate process. The processes take turns, and the table shows medians. The time
to read the prompt does not count.

Then llama.cpp predicts, with each file, the tokens of the text in evenly spread windows. From a prepared dataset, the
script uses the validation split. The bits per byte come from the mean log-probability of these tokens. The drift of a
token is the absolute difference in nats between its log-probability with a file and with the f32 file. The table shows
the mean drift and the largest drift.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import Contender, take_turns
from results import add_record_option, recorded

PROMPT = "The river"


@dataclass(frozen=True)
class Row:
    """The results of a type. `logprobs` has the shape (tokens,)."""

    type: str
    num_bytes: int
    tokens_per_second: float
    bits_per_byte: float
    logprobs: Any


# The child: llama.cpp with one file


def prepare(file: str, context: int, threads: int) -> Callable[[int], float]:
    """Takes the number of tokens to generate, and returns the tokens per second."""
    from atlas.export.llama_cpp import connect, load

    server = load(file, context, threads)

    def tokens_per_second(tokens: int) -> float:
        post = connect(server)  # a new one for each turn: the server closes a connection that is idle
        request = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        timings = post("/completion", request | {"cache_prompt": False})["timings"]
        if timings["predicted_n"] != tokens:
            raise SystemExit(f"wrote {timings['predicted_n']} tokens instead of {tokens}")
        # llama.cpp's clock starts with the first token.
        return float((tokens - 1) / timings["predicted_ms"] * 1000)

    tokens_per_second(8)  # to warm up
    return tokens_per_second


# The parent


def speeds(arguments: argparse.Namespace, files: Mapping[str, Path], context: int) -> dict[str, float]:
    """Return the tokens per second with each file: the median of the rounds."""
    tokens = min(arguments.written, context - len(PROMPT))
    contenders = {name: contender(arguments, name, file, context) for name, file in files.items()}
    for each in contenders.values():
        each.launch()
        if not each.is_ready():
            raise SystemExit("nothing to compare")
    measured: dict[str, list[float]] = {name: [] for name in files}
    for number in range(arguments.rounds):
        for name, each in contenders.items():
            measured[name].append(each.ask(tokens))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    for each in contenders.values():
        each.stop()
    return {name: statistics.median(rates) for name, rates in measured.items()}


def contender(arguments: argparse.Namespace, name: str, file: Path, context: int) -> Contender:
    given = ["--checkpoint", arguments.checkpoint, "--data", arguments.data]
    child = ["--child", str(file), str(context), str(arguments.threads)]
    return Contender(name, [sys.executable, __file__, *given, *child])


def report(rows: Sequence[Row]) -> None:
    """Print a table that compares every row with the first row."""
    first = rows[0]
    print(
        f"| | MB | ÷ {first.type} | tokens/s | ÷ {first.type} | bits per byte | − {first.type} | drift | at most |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        drift = abs(row.logprobs - first.logprobs)
        print(
            f"| {row.type} | {row.num_bytes / 1e6:,.2f} | {row.num_bytes / first.num_bytes:.2f} "
            f"| {row.tokens_per_second:,.0f} | {row.tokens_per_second / first.tokens_per_second:.2f} "
            f"| {row.bits_per_byte:.4f} | {row.bits_per_byte - first.bits_per_byte:+.4f} "
            f"| {drift.mean():.4f} | {drift.max():.3f} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--data", required=True, help="a prepared folder or plain text, as for atlas evaluate"
    )
    parser.add_argument(
        "--tokens", type=int, default=4000, help="number of tokens of the text; default: %(default)s"
    )
    parser.add_argument(
        "--written", type=int, default=200, help="tokens to generate per round; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    add_record_option(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        file, context, threads = arguments.child
        take_turns(lambda: prepare(file, int(context), int(threads)))
        return

    from atlas.export.gguf import export_gguf
    from atlas.export.quantize import QUANTIZATIONS
    from atlas.export.score import llama_cpp_logprobs, pytorch_logprobs, sample_of
    from atlas.inference.load import load_model

    loaded = load_model(arguments.checkpoint)
    shape = loaded.config.model
    sample = sample_of(arguments.data, loaded.tokenizer, shape.max_seq_len, num_tokens=arguments.tokens)
    with tempfile.TemporaryDirectory() as folder, recorded("Quantization", arguments):
        files = {kind: Path(folder, f"{kind}.gguf") for kind in QUANTIZATIONS}
        for kind, file in files.items():
            export_gguf(loaded.model, loaded.tokenizer, file, quantize=kind)
        rates = speeds(arguments, files, shape.max_seq_len)
        rows = []
        for kind, file in files.items():
            logprobs = llama_cpp_logprobs(file, sample)
            bits = sample.bits_per_byte(logprobs)
            rows.append(Row(kind, file.stat().st_size, rates[kind], bits, logprobs))
            print(f"{kind}: {bits:.4f} bits per byte", file=sys.stderr)
        print(
            f"{loaded.model.num_parameters():,} parameters, {shape.num_layers} layers of {shape.hidden_size}, "
            f"{sample.num_tokens:,} tokens of text, {arguments.threads} threads, medians of {arguments.rounds} rounds "
            f"in turn\nPyTorch, with the checkpoint's own weights: "
            f"{sample.bits_per_byte(pytorch_logprobs(loaded.model, sample)):.4f} bits per byte\n"
        )
        report(rows)


if __name__ == "__main__":
    main()
