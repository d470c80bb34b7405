"""`atlas import`: make a checkpoint from a model in Hugging Face's format, or from a checkpoint of Atlas 1.x."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atlas.cli.terminal import say
from atlas.errors import AtlasError
from atlas.files import local_path


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with config.json, *.safetensors and tokenizer.json, a GGUF file, or a checkpoint of "
            "Atlas 1.x (.pt).",
            show_default=False,
        ),
    ],
    output_dir: Annotated[
        str | None,
        typer.Option(
            help="The folder to write the checkpoint to.",
            show_default="checkpoints/<name of the folder>, or checkpoints/imported-<name of the file>",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="The tokenizer of a model that comes with none, or with one that Atlas cannot build: gpt2, or a "
            "tokenizer.json."
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(
            help="For a checkpoint of Atlas 1.x: the number of attention heads, which the file does not record.",
            min=1,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="For a checkpoint of Atlas 1.x: the YAML config of the old run.", metavar="FILE"),
    ] = None,
) -> None:
    """Make a checkpoint from a model in Hugging Face's format (GPT-2, Llama, Qwen 2 and 3, SmolLM, Mistral, Phi-3),
    from a GGUF file, or from a checkpoint of Atlas 1.x. Atlas can generate text with the new checkpoint and fine-tune
    it."""
    from atlas.export.gguf_header import is_gguf
    from atlas.export.import_first_version import import_first_version
    from atlas.export.import_gguf import import_gguf
    from atlas.export.import_hf import import_hf, read_sampling, window_note
    from atlas.export.save_imported import save_imported
    from atlas.tokenizer.chat_template import template_fault

    path, notes, sampling = Path(source), list[str](), dict[str, Any]()
    if not path.exists():
        raise AtlasError(
            f"{path}: no such file or folder; give a folder with config.json, a GGUF file, or a .pt of Atlas 1.x"
        )
    is_file = path.is_file()
    # The prefix distinguishes the folder from the sharded checkpoints (atlas_step_N) of a run in checkpoints/.
    name = f"imported-{path.stem}" if is_file else path.resolve().name
    output = local_path("--output-dir", output_dir) if output_dir else Path("checkpoints") / name
    if output.exists() and not output.is_dir():
        raise AtlasError(f"{output}: is a file; choose another --output-dir")
    found = {path.name for path in output.iterdir()} if output.exists() else set()
    if "atlas_best.pt" in found or found - _LEFT_BY_A_KILL:  # Atlas overwrites no files
        raise AtlasError(f"{output}: is not empty; choose another --output-dir")
    takes_shape = num_heads is not None or config is not None
    if is_file and is_gguf(path):
        _check_shape(path, takes_shape=takes_shape)
        model, own, notes = import_gguf(path, tokenizer=tokenizer)
    elif is_file:
        model, own, notes = import_first_version(
            path, num_heads=num_heads, config=config, tokenizer=tokenizer
        )
    else:
        _check_folder(path)
        _check_shape(path, takes_shape=takes_shape)
        model, own = import_hf(path, tokenizer=tokenizer)
        notes, sampling = window_note(path, model.config.max_seq_len), read_sampling(path)
    written = save_imported(model, own, output, source=source, sampling=sampling)
    shape = model.config
    if own.chat_template and (fault := template_fault(own.chat_template)):
        notes.append(f"warning: its chat template is not Jinja, so the model cannot chat: {fault}")
    say(
        *notes,
        f"{shape.gguf_architecture}: {model.num_parameters():,} parameters, context {shape.max_seq_len:,}, "
        f"tokenizer {own.name} of {own.vocab_size:,} tokens",
    )
    typer.echo(written)


_LEFT_BY_A_KILL = {
    "atlas.lock",
    "atlas_writing.tmp",
    "atlas_best.pt.tmp",
    "atlas_best.json.tmp",
    "atlas_best.json",
}
"""The files that a killed import can leave before `atlas_best.pt` exists."""


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / "config.json").exists() and (files := sorted(folder.glob("*.pt"))):
        best = folder / "atlas_best.pt"
        example = best if best in files else files[-1]
        raise AtlasError(
            f"{folder}: has no config.json; to convert a checkpoint of Atlas 1.x, name the file, such as {example}"
        )


def _check_shape(source: Path, *, takes_shape: bool) -> None:
    if takes_shape:
        raise AtlasError(
            f"--num-heads and --config are for a checkpoint of Atlas 1.x (.pt), and {source} is another model: omit "
            "both options"
        )
