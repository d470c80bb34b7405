"""`atlas export`: a checkpoint as a GGUF file, and its proof in llama.cpp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.export.gguf import ExportedFile, Quantization
    from atlas.inference.load import LoadedModel


class Type(str, Enum):
    """The types `--quantize` takes."""

    f32 = "f32"
    f16 = "f16"


def export(
    checkpoint: Annotated[str, typer.Option(help="The checkpoint to export.")] = "checkpoints/atlas_best.pt",
    output: Annotated[str, typer.Option(help="The GGUF file to write.")] = "atlas_model.gguf",
    quantize: Annotated[
        Type, typer.Option(help="Type of the matrices: f32 is exact, f16 half the size.")
    ] = Type.f16,
    verify: Annotated[
        bool, typer.Option(help="Run the file in llama.cpp (package xllamacpp) and compare it with PyTorch.")
    ] = True,
) -> None:
    """Write a GGUF file with the tokenizer inside, for llama.cpp and all that is built on it, and prove it."""
    from atlas.inference.load import NOT_NEEDED, model_of
    from atlas.training.checkpoint import find_checkpoint, load_checkpoint

    path = find_checkpoint(checkpoint)
    contents = load_checkpoint(path, say=_say, without=NOT_NEEDED)
    if contents["tokenizer"].get("kind") == "custom":
        raise AtlasError(
            f"{path}: was trained with data.tokenizer {contents['tokenizer'].get('name')}, custom code that a "
            "GGUF file cannot hold; train with gpt2 or a tokenizer.json to export"
        )
    export_and_prove(model_of(contents, path), Path(output), quantize=quantize.value, verify=verify)


def export_and_prove(
    loaded: LoadedModel, output: Path, *, quantize: Quantization, verify: bool, texts: Sequence[str] = ()
) -> None:
    """Write `output`, and unless `verify` is off, compare it in llama.cpp; its path goes to standard output.

    Raises `AtlasError` for a file that fails the proof; it is left for a look.
    """
    from atlas.export.gguf import export_gguf

    written = export_gguf(loaded.model, loaded.tokenizer, output, quantize=quantize, name=output.stem)
    _say(_table(written))
    if verify:
        _prove(loaded, output, quantize, texts)
    else:
        _say("not verified: --no-verify")
    typer.echo(output)


def _prove(loaded: LoadedModel, output: Path, quantize: Quantization, texts: Sequence[str]) -> None:
    from atlas.export.llama_cpp import is_available
    from atlas.export.verify import verify_gguf

    if not is_available():
        _say(
            'NOT VERIFIED: llama.cpp is not here to run it; pip install "atlas-llm[llama]", then export again'
        )
        return
    proof = verify_gguf(output, loaded.model, loaded.tokenizer, quantize=quantize, texts=texts)
    _say(str(proof))
    if not proof.holds:
        failed = ", ".join(name for name, agrees, _ in proof.checks if not agrees)
        remedy = "try --quantize f32" if quantize == "f16" else "do not use this file"
        raise AtlasError(f"{output}: llama.cpp does not say what the model says ({failed}); {remedy}")
    _say("proved: llama.cpp says what the model says")


def _table(written: ExportedFile) -> str:
    counts = Counter(written.tensor_types.values())
    tensors = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    rows = {
        "architecture": written.architecture,
        "tensors": f"{len(written.tensor_types)}: {tensors}",
        "size": f"{written.num_bytes / 1e6:,.1f} MB",
    }
    return "\n".join(f"{name:<13} {value}" for name, value in rows.items())


def _say(line: str) -> None:
    typer.echo(line, err=True)
