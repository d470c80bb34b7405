"""Options that several commands share, as typer annotations of the commands' parameters."""

from __future__ import annotations

from typing import Annotated

import typer

BEST_CHECKPOINT = "checkpoints/atlas_best.pt"
"""The default of `--checkpoint`."""

Checkpoint = Annotated[str, typer.Option(help="The checkpoint to use.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of the weights and the KV cache: f32, bf16, f16 or auto (half precision if the device "
        "computes in it, else f32).",
        metavar="DTYPE",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="Use a shorter context than the model's, in tokens. It needs less memory.", min=1),
]
CustomTokenizer = Annotated[
    str | None, typer.Option(help="package.module:factory, for a model trained with a custom tokenizer.")
]
Temperature = Annotated[
    float, typer.Option(help="0: always choose the likeliest token; higher values: more random.")
]
TopK = Annotated[int, typer.Option(help="Keep only the k likeliest tokens; 0: keep all.")]
TopP = Annotated[
    float, typer.Option(help="Keep only the likeliest tokens, up to this total probability; 1: keep all.")
]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep only tokens with at least this fraction of the likeliest token's probability; 0: keep all."
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: make tokens that occurred earlier less likely.")
]
