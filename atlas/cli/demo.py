"""The demo: from text to a verified GGUF file in one command, on a laptop's CPU."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from atlas.cli.choose_preset import ON_A_CPU, VOCABULARY, print_next_commands
from atlas.cli.export import export_and_prove
from atlas.cli.terminal import say
from atlas.cli.train import train_to_the_end
from atlas.config.loader import Layer, overlay, read_yaml
from atlas.config.presets import preset_path
from atlas.data import TokenStream, prepare
from atlas.data.text.demo import write_demo_corpus
from atlas.errors import AtlasError
from atlas.inference.load import load_model
from atlas.inference.sampling import Sampling
from atlas.inference.text import stream_text
from atlas.tokenizer import END_OF_TEXT, Tokenizer
from atlas.training.resume import Request

_SAMPLES, _SAMPLE_TOKENS = 3, 120


def run_demo(text: str | None, folder: Path, overrides: Layer, *, no_resume: bool) -> None:
    """Run the demo in `folder`: text → tokens → model → samples → GGUF file → verification in llama.cpp.

    Without `text`, the demo uses Python's own documentation. The demo does not repeat the preparation and the training
    if an earlier call finished them.
    """
    start = time.perf_counter()
    _headline(1, "text" if text else "text: the documentation inside Python's standard library")
    source = Path(text) if text else write_demo_corpus(folder / "corpus.jsonl")

    _headline(2, f"tokens: a byte-level BPE of {VOCABULARY:,} entries, trained on this text")
    summary = prepare([source], folder / "data", train_tokenizer=VOCABULARY)
    say(*summary.notes)

    _headline(3, f"training the {ON_A_CPU} model on these tokens")
    checkpoints = folder / "checkpoints"
    paths = {
        "data": {"train_data": str(summary.dataset.folder)},
        "checkpoint": {"output_dir": str(checkpoints)},
    }
    explicit = overlay(overlay(read_yaml(preset_path(ON_A_CPU)), paths), overrides)
    train_to_the_end(Request(explicit, resume=None if no_resume else "auto", no_resume=no_resume))

    best = checkpoints / "atlas_best.pt"
    loaded = load_model(best)
    prompts = _openings(summary.dataset.split("val"), loaded.tokenizer)
    _headline(4, "samples: the model continues the beginnings of held-out texts")
    texts = list(prompts)
    for step in stream_text(loaded, prompts, Sampling(), max_tokens=_SAMPLE_TOKENS, seed=1):
        texts = [text + new for text, new in zip(texts, step, strict=True)]
    for completed in texts:
        typer.echo(f"\n{completed}\n\n{'─' * 40}")

    _headline(5, "export to GGUF, and verification in llama.cpp")
    export_and_prove(loaded, folder / "atlas_demo.gguf", quantize="f32", verify=True, texts=prompts)
    say(f"\nthe demo took {time.perf_counter() - start:.0f} s; all files are in {folder}/")
    print_next_commands(best)


def _openings(stream: TokenStream | None, tokenizer: Tokenizer) -> list[str]:
    """Return prompts: the first three words of lines spread over the held-out text."""
    if stream is None:
        raise AtlasError("the text is too short to hold out a part for validation: give a longer text")
    openings = []
    for number in range(_SAMPLES):
        start = stream.num_tokens * number // _SAMPLES
        ids = stream.read(start, min(start + 400, stream.num_tokens)).tolist()
        # Drop the first line, since this line may be incomplete.
        lines = tokenizer.decode(ids).replace(END_OF_TEXT, "\n").splitlines()[1:]
        words = next((line.split() for line in lines if len(line.split()) > 4), ["The"])
        openings.append(" ".join(words[:3]))
    return openings


def _headline(number: int, text: str) -> None:
    say(f"\n── {number}/5 {text}")
