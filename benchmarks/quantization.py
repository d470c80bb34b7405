"""What each type of `atlas export --quantize` makes of a model: its size, its speed and bits per byte in llama.cpp.

    python benchmarks/quantization.py --checkpoint checkpoints/atlas_best.pt --data data/processed/wikipedia
    python benchmarks/quantization.py --checkpoint checkpoints/atlas_best.pt --data held_out.txt --tokens 20000

The checkpoint is exported in each type. llama.cpp (package `xllamacpp`) writes one text greedily with each file, on the
CPU; every file is in a process of its own, they take turns, and medians count. Reading the prompt does not count.

Then each file predicts the tokens of the text, windows of it spread evenly (the validation part of a prepared folder).
Bits per byte are the mean log-probability of these tokens in llama.cpp. The drift is how far the log-probability of a
token is from that of the f32 file, on average and at most: what it is in nats, whichever way it goes.
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
    """What was found of a type; `logprobs` is (tokens,)."""

    type: str
    num_bytes: int
    tokens_per_second: float
    bits_per_byte: float
    logprobs: Any


# The child: llama.cpp with one file


def prepare(file: str, context: int, threads: int) -> Callable[[int], float]:
    """A number of tokens to write → tokens a second."""
    from atlas.export.llama_cpp import connect, load

    server = load(file, context, threads)

    def tokens_per_second(tokens: int) -> float:
        post = connect(server)  # a new one for each turn: the server closes what is idle for seconds
        request = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        timings = post("/completion", request | {"cache_prompt": False})["timings"]
        if timings["predicted_n"] != tokens:
            raise SystemExit(f"wrote {timings['predicted_n']} tokens instead of {tokens}")
        return float((tokens - 1) / timings["predicted_ms"] * 1000)  # its clock starts with the first token

    tokens_per_second(8)  # to warm up
    return tokens_per_second


# The parent


def speeds(arguments: argparse.Namespace, files: Mapping[str, Path], context: int) -> dict[str, float]:
    """Tokens a second with each file, the median of the rounds."""
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
    """A table; the first row is what the others are compared with."""
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
    parser.add_argument("--tokens", type=int, default=4000, help="of the text; default: %(default)s")
    parser.add_argument("--written", type=int, default=200, help="tokens a round; default: %(default)s")
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
        files = {
            kind: export_gguf(loaded.model, loaded.tokenizer, Path(folder, f"{kind}.gguf"), quantize=kind)
            for kind in QUANTIZATIONS
        }
        rates = speeds(arguments, {kind: file.path for kind, file in files.items()}, shape.max_seq_len)
        rows = []
        for kind, file in files.items():
            logprobs = llama_cpp_logprobs(file.path, sample)
            bits = sample.bits_per_byte(logprobs)
            rows.append(Row(kind, file.num_bytes, rates[kind], bits, logprobs))
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
