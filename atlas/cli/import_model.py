"""`atlas import`: a public model in Hugging Face's format as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atlas.errors import AtlasError


def import_model(
    folder: Annotated[
        str,
        typer.Argument(
            help="A folder with config.json, *.safetensors and tokenizer.json.", show_default=False
        ),
    ],
    output_dir: Annotated[
        str | None,
        typer.Option(help="Where the checkpoint goes.", show_default="checkpoints/<name of the folder>"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its tokenizer, where the folder has none: gpt2, or a tokenizer.json.")
    ] = None,
) -> None:
    """Make a checkpoint of a model in Hugging Face's format (GPT-2, Llama, Qwen3), to write with or to fine-tune."""
    from atlas.export.import_hf import import_hf, read_chat_template
    from atlas.training.imported import save_imported

    output = Path(output_dir) if output_dir else Path("checkpoints") / Path(folder).resolve().name
    if output.exists() and any(output.iterdir()):
        raise AtlasError(f"{output}: is not empty; choose another --output-dir")
    model, own = import_hf(folder, tokenizer=tokenizer)
    path = save_imported(
        model, own, output, source=str(folder), chat_template=read_chat_template(Path(folder))
    )
    config = model.config
    typer.echo(
        f"{config.gguf_architecture}: {model.num_parameters():,} parameters, context {config.max_seq_len:,}, "
        f"tokenizer {own.name} of {own.vocab_size:,} tokens",
        err=True,
    )
    typer.echo(path)
