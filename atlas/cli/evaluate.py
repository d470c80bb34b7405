"""`atlas evaluate`: how well a checkpoint predicts a text."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            help="A prepared folder (its validation part, where it has one) or plain text (all of it)."
        ),
    ],
    checkpoint: Annotated[str, typer.Option(help="The checkpoint to judge.")] = "checkpoints/atlas_best.pt",
    batch_size: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
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
    from atlas.data import SequenceDataset, resolve_data
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
    dataset = SequenceDataset(
        stream,
        loaded.config.model.max_seq_len,
        pad_last=True,
        with_documents=loaded.config.data.document_mask,
    )
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
