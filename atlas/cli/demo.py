"""The road from text to a proved GGUF file in one go, small enough for a laptop's CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from atlas.cli.choose_preset import ON_A_CPU, VOCABULARY, print_next_commands
from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.config.loader import Layer
    from atlas.data import TokenStream
    from atlas.inference.load import LoadedModel
    from atlas.tokenizer import Tokenizer

_SAMPLES, _SAMPLE_TOKENS = 3, 120


def demo_road(text: str | None, folder: Path, overrides: Layer, *, no_resume: bool) -> None:
    """Text → tokens → model → samples → GGUF → proof, all below `folder`. `text` None: Python's own
    documentation. What an earlier call finished is not done again.
    """
    from atlas.config.loader import overlay, read_yaml
    from atlas.config.presets import preset_path
    from atlas.data import prepare
    from atlas.data.text.demo import write_demo_corpus
    from atlas.training.launch import start_run
    from atlas.training.resume import Request, choose_start

    begun = time.perf_counter()
    _headline(1, "text" if text else "text: the documentation inside Python's standard library")
    source = Path(text) if text else write_demo_corpus(folder / "corpus.jsonl")

    _headline(2, f"tokens: a byte-level BPE of {VOCABULARY:,} entries, learnt from this text")
    summary = prepare([source], folder / "data", train_tokenizer=VOCABULARY)
    for note in summary.notes:
        typer.echo(note, err=True)

    _headline(3, f"training the {ON_A_CPU} model on it")
    from atlas.cli.train import train_to_the_end
    from atlas.inference.samples import sample_texts

    checkpoints = folder / "checkpoints"
    paths = {
        "data": {"train_data": str(summary.dataset.folder)},
        "checkpoint": {"output_dir": str(checkpoints)},
    }
    explicit = overlay(overlay(read_yaml(preset_path(ON_A_CPU)), paths), overrides)
    request = Request(explicit, resume=None if no_resume else "auto", no_resume=no_resume)
    train_to_the_end(start_run(choose_start(request), sampler=sample_texts))

    _finish(checkpoints / "atlas_best.pt", folder / "atlas_demo.gguf", summary.dataset.split("val"))
    typer.echo(
        f"\nthe whole road took {time.perf_counter() - begun:.0f} s; everything is in {folder}/", err=True
    )
    print_next_commands(checkpoints / "atlas_best.pt")


def _finish(checkpoint: Path, output: Path, held_out: TokenStream | None) -> None:
    """Samples, export and proof of a trained model."""
    from atlas.cli.export import export_and_prove
    from atlas.inference.load import load_model

    loaded = load_model(checkpoint)
    prompts = _openings(held_out, loaded.tokenizer)
    _headline(4, "samples: the model continues the beginnings of texts it has not seen")
    _print_samples(loaded, prompts)
    _headline(5, "export to GGUF, and the proof in llama.cpp")
    export_and_prove(loaded, output, quantize="f32", verify=True, texts=prompts)


def _print_samples(loaded: LoadedModel, prompts: list[str]) -> None:
    from atlas.inference.sampling import Sampling
    from atlas.inference.text import stream_text

    texts = list(prompts)
    for step in stream_text(loaded, prompts, Sampling(), max_tokens=_SAMPLE_TOKENS, seed=1):
        texts = [text + new for text, new in zip(texts, step, strict=True)]
    for text in texts:
        typer.echo(f"\n{text}\n\n{'─' * 40}")


def _openings(stream: TokenStream | None, tokenizer: Tokenizer) -> list[str]:
    """The first words of lines from all over the held-out text."""
    from atlas.tokenizer import END_OF_TEXT

    if stream is None:
        raise AtlasError("no text is held out for validation: give a longer text")
    openings = []
    for number in range(_SAMPLES):
        start = stream.num_tokens * number // _SAMPLES
        ids = stream.read(start, min(start + 400, stream.num_tokens)).tolist()
        lines = tokenizer.decode(ids).replace(END_OF_TEXT, "\n").splitlines()[1:]  # the first is cut off
        words = next((line.split() for line in lines if len(line.split()) > 4), ["The"])
        openings.append(" ".join(words[:3]))
    return openings


def _headline(number: int, text: str) -> None:
    typer.echo(f"\n── {number}/5 {text}", err=True)
