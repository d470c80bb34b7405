"""`atlas evaluate`: how well a checkpoint predicts a text."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.cli.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

    from atlas.data.sequences import Windows
    from atlas.model import AtlasLM
    from atlas.tokenizer import Tokenizer
    from atlas.training.runtime import Runtime

_MARKED, _AROUND = 8, 40
"""Tokens of a window that are marked, and shown before and after the worst."""


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            help="A prepared folder (its validation part, where it has one), plain text or conversations (all of it)."
        ),
    ],
    checkpoint: Annotated[str, typer.Option(help="The checkpoint to judge.")] = "checkpoints/atlas_best.pt",
    batch_size: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    worst: Annotated[
        int, typer.Option(help="Show so many windows of the text that are predicted worst.", min=0)
    ] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="package.module:factory, for a model trained with a custom tokenizer.")
    ] = None,
) -> None:
    """Loss, perplexity and bits per byte of a checkpoint on a text.

    Bits per byte compare models with different tokenizers; loss and perplexity do not.
    """
    from rich.console import Console
    from rich.progress import track

    from atlas.config.loader import nested, overlay, resolve
    from atlas.data import resolve_data, validation_windows
    from atlas.errors import AtlasError
    from atlas.inference.load import load_model
    from atlas.training.evaluate import evaluate as measure
    from atlas.training.runtime import setup_runtime

    loaded = load_model(checkpoint, device=device, tokenizer=tokenizer)
    resolved = resolve_data(data, None, tokenizer=loaded.tokenizer, val_fraction=0.0)
    if resolved.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise AtlasError(
            f"{data}: was prepared with tokenizer {resolved.tokenizer.name}, and {checkpoint} reads "
            f"{loaded.tokenizer.name}'s ids: give --data the text that it was prepared from"
        )
    stream = resolved.val or resolved.train
    dataset = validation_windows(stream, loaded.config)
    runtime = setup_runtime(resolve(overlay({"device": device}, nested("training.precision", "fp32"))))
    console = Console(stderr=True)
    result = measure(
        loaded.model,
        dataset,
        range(len(dataset)),
        batch_size=batch_size,
        runtime=runtime,
        track=lambda starts: track(starts, "evaluating", console=console, disable=not console.is_terminal),
    )
    assert result is not None
    part = "validation part" if resolved.val else "whole text"
    typer.echo(
        f"{data} ({part}), {result.tokens:,} tokens\n"
        f"loss           {result.loss:.4f} nats per token\n"
        f"perplexity     {result.perplexity:,.2f}\n"
        f"bits per byte  {result.bits_per_byte:.4f}"
    )
    if worst:
        _show_worst(loaded.model, dataset, resolved.tokenizer, runtime, worst, console)


def _show_worst(
    model: AtlasLM,
    dataset: Windows,
    tokenizer: Tokenizer,
    runtime: Runtime,
    count: int,
    console: Console,
) -> None:
    """Each window's mean loss, and the text around its worst token, the tokens that cost most marked ⟦so⟧."""
    from rich.progress import track

    from atlas.training.evaluate import token_losses

    windows = track(range(len(dataset)), "looking", console=console, disable=not console.is_terminal)
    losses = {window: token_losses(model, dataset, window, runtime=runtime) for window in windows}
    ranked = sorted(losses, key=lambda window: -float(losses[window].nanmean()))
    for rank, window in enumerate(ranked[:count], start=1):
        mean, costs = float(losses[window].nanmean()), losses[window].nan_to_num()
        ids, worst = dataset[window][1].tolist(), int(costs.argmax())
        marked = set(costs.topk(min(_MARKED, len(costs))).indices.tolist())
        around = range(max(0, worst - _AROUND), min(len(ids), worst + _AROUND))
        shown = _marked_text(
            [(ids[place], place in marked) for place in around if ids[place] >= 0], tokenizer
        )
        typer.echo(
            f"\n{rank}. window {window:,}: {mean:.3f} nats per token, {float(costs[worst]):.1f} for "
            f"{printable(tokenizer.decode([ids[worst]]))!r}\n   {printable(' '.join(shown.split()))}"
        )


def _marked_text(tokens: list[tuple[int, bool]], tokenizer: Tokenizer) -> str:
    runs = [
        (is_marked, tokenizer.decode([id for id, _ in run]))
        for is_marked, run in itertools.groupby(tokens, key=lambda token: token[1])
    ]
    return "".join(f"⟦{text}⟧" if is_marked else text for is_marked, text in runs)
