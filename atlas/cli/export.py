"""`atlas export`: a checkpoint as a GGUF file, with its proof in llama.cpp, or in Hugging Face's format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.export.gguf import ExportedFile
    from atlas.export.huggingface import HFType
    from atlas.export.judge import Sample
    from atlas.export.quantize import Quantization
    from atlas.inference.load import LoadedModel


class Type(str, Enum):
    """The types `--quantize` takes, the largest file first."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q6_k = "q6_k"
    q5_k_m = "q5_k_m"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_k_m = "q4_k_m"
    q4_1 = "q4_1"
    q4_0 = "q4_0"


class Format(str, Enum):
    """The forms `--format` takes."""

    gguf = "gguf"
    hf = "hf"
    peft = "peft"


def export(
    checkpoint: Annotated[str, typer.Option(help="The checkpoint to export.")] = "checkpoints/atlas_best.pt",
    output: Annotated[
        str | None,
        typer.Option(
            help="The GGUF file to write, or the folder for hf and peft.",
            show_default="atlas_model.gguf, atlas_model",
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="gguf: a file for llama.cpp. hf: a folder for Hugging Face's transformers. "
            "peft: the updates of lora alone."
        ),
    ] = Format.gguf,
    quantize: Annotated[
        Type | None,
        typer.Option(
            help="Type of the matrices: f32 is exact, f16 or bf16 half the size, q8_0 a quarter, q4_k_m a fifth.",
            show_default="gguf f16, hf f32",
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The model's licence, as an SPDX identifier such as mit.")
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="gguf: write a Modelfile for Ollama beside the file.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(help="gguf: run the file in llama.cpp (package xllamacpp) and compare it with PyTorch."),
    ] = True,
    data: Annotated[
        str | None,
        typer.Option(
            help="gguf: judge the file by this text, plain or prepared: bits per byte in llama.cpp and in PyTorch."
        ),
    ] = None,
) -> None:
    """Write a model with its tokenizer for other programs: a GGUF file, proved in llama.cpp, or a folder."""
    from atlas.inference.load import NOT_NEEDED, model_of
    from atlas.training.checkpoint.load import load_checkpoint
    from atlas.training.checkpoint.locate import find_checkpoint

    if data is not None and format is not Format.gguf:
        raise AtlasError(f"--data: is for GGUF, which llama.cpp runs; --format {format.value} takes none")
    if data is not None and not verify:
        raise AtlasError(
            "--data: judges the file in llama.cpp, and --no-verify leaves that out; drop one of them"
        )
    path = find_checkpoint(checkpoint)
    contents = load_checkpoint(path, say=_say, without=NOT_NEEDED)
    if contents["tokenizer"].get("kind") == "custom":
        raise AtlasError(
            f"{path}: was trained with data.tokenizer {contents['tokenizer'].get('name')}, custom code that no "
            "file can hold; train with gpt2 or a tokenizer.json to export"
        )
    if format is Format.peft:
        if quantize or modelfile:
            raise AtlasError("--format peft: takes no --quantize and no --modelfile")
        _export_adapter(contents, path, Path(output or "atlas_model"))
        return
    loaded = model_of(contents, path)
    if format is Format.hf:
        kind = quantize or Type.f32
        if kind not in (Type.f32, Type.f16, Type.bf16):
            raise AtlasError(f"--quantize {kind.value}: is for GGUF; --format hf takes f32, f16 or bf16")
        if modelfile:
            raise AtlasError("--modelfile: is for GGUF; Ollama reads no folder of --format hf")
        _export_hf(loaded, Path(output or "atlas_model"), kind.value, license)
        return
    if modelfile and loaded.chat_template and not loaded.learnt_to_answer:
        raise AtlasError(
            "--modelfile: the model was imported with a chat template of its own, which Ollama wants in another "
            "language; leave --modelfile out and write TEMPLATE yourself"
        )
    kind, target = quantize or Type.f16, Path(output or "atlas_model.gguf")
    sample = _sample(loaded, data) if data is not None else None
    export_and_prove(loaded, target, quantize=kind.value, verify=verify, license=license, sample=sample)
    if modelfile:
        _write_modelfile(target, loaded)


_OLLAMA_CHAT = """\"\"\"{{ range .Messages }}<|{{ .Role }}|>
{{ .Content }}<|endoftext|>
{{ end }}<|assistant|>
\"\"\""""
"""`CHAT_TEMPLATE` as Ollama writes it, but that it keeps blanks around what is said."""


def _write_modelfile(file: Path, loaded: LoadedModel) -> None:
    """For Ollama, which is told the form of a conversation, or to pass the prompt on as it is."""
    context = loaded.config.model.max_seq_len
    target = file.with_name("Modelfile")
    if target.exists() and not target.read_text(encoding="utf-8", errors="replace").startswith("FROM "):
        raise AtlasError(f"{target}: exists and is not a Modelfile; move it, or export into another folder")
    target.write_text(
        f"FROM ./{file.name}\n"
        f"TEMPLATE {_OLLAMA_CHAT if loaded.learnt_to_answer else '{{ .Prompt }}'}\n"
        f"PARAMETER num_ctx {context}\n"
        "PARAMETER temperature 0.8\nPARAMETER top_k 50\nPARAMETER top_p 0.95\n",
        encoding="utf-8",
    )
    typer.echo(target)


def _export_adapter(contents: dict[str, Any], path: Path, folder: Path) -> None:
    from atlas.config.loader import resolve
    from atlas.export.peft import export_adapter

    config, base = resolve(contents["config"]), str(contents.get("initialized_from") or "")
    export_adapter(contents["model_state_dict"], config.model, config.lora, folder, base=base)
    _list_files(folder)


def _list_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        _say(f"{path.name:<26} {path.stat().st_size:>13,} bytes")
    typer.echo(folder)


def _export_hf(loaded: LoadedModel, folder: Path, dtype: HFType, license: str | None) -> None:
    from atlas.export.huggingface import export_hf

    export_hf(
        loaded.model,
        loaded.tokenizer,
        folder,
        dtype=dtype,
        name=folder.name,
        facts=loaded.facts,
        license=license,
        chat_template=loaded.chat_template,
    )
    _list_files(folder)


def export_and_prove(
    loaded: LoadedModel,
    output: Path,
    *,
    quantize: Quantization,
    verify: bool,
    texts: Sequence[str] = (),
    license: str | None = None,
    sample: Sample | None = None,
) -> None:
    """Write `output`, and unless `verify` is off, compare it in llama.cpp, and tell how well it predicts `sample`; its
    path goes to standard output.

    Raises `AtlasError` for a file that fails the proof; it is left for a look.
    """
    from atlas.export.gguf import export_gguf

    written = export_gguf(
        loaded.model,
        loaded.tokenizer,
        output,
        quantize=quantize,
        name=output.stem,
        license=license,
        chat_template=loaded.chat_template,
    )
    _say(_table(written))
    if in_f16 := sum(type == "f16" for type in written.tensor_types.values()) * quantize.startswith("q"):
        _say(
            f"note: {in_f16} matrices are f16, not {quantize}: their rows do not divide into blocks of 32; "
            "to quantize them, train with a hidden_size that 32 divides"
        )
    if loaded.config.model.mlp == "gelu_exact":
        _say(
            "model.mlp gelu_exact: llama.cpp computes GELU's tanh form, which differs from it by at most 5e-4; "
            "--data TEXT measures what that changes"
        )
    if verify:
        _prove(loaded, output, quantize, texts, sample)
    else:
        _say("not verified: --no-verify")
    typer.echo(output)


def _prove(
    loaded: LoadedModel, output: Path, quantize: Quantization, texts: Sequence[str], sample: Sample | None
) -> None:
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
        remedy = "do not use this file" if quantize == "f32" else "try --quantize f32"
        raise AtlasError(f"{output}: llama.cpp does not say what the model says ({failed}); {remedy}")
    _say("proved: llama.cpp says what the model says")
    if sample:
        _judge(loaded, output, sample)


def _sample(loaded: LoadedModel, data: str) -> Sample:
    from atlas.export.judge import sample_of

    return sample_of(data, loaded.tokenizer, loaded.config.model.max_seq_len)


def _judge(loaded: LoadedModel, output: Path, sample: Sample) -> None:
    from atlas.export.judge import llama_cpp_logprobs, pytorch_logprobs

    theirs, ours = llama_cpp_logprobs(output, sample), pytorch_logprobs(loaded.model, sample)
    _say(
        f"bits per byte  {sample.bits_per_byte(theirs):.4f} in llama.cpp, {sample.bits_per_byte(ours):.4f} in PyTorch "
        f"with the checkpoint's own weights, on {sample.num_tokens:,} tokens of {sample.name}"
    )


def _table(written: ExportedFile) -> str:
    counts = Counter(written.tensor_types.values())
    tensors = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    rows = {
        "architecture": written.architecture,
        "tensors": f"{len(written.tensor_types)}: {tensors}",
        "size": f"{written.num_bytes / 1e6:,.1f} MB",
    }
    if len(counts) > 2:  # a mixture
        rows |= _types_by_tensor(written.tensor_types)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}} {value}" for name, value in rows.items())


def _types_by_tensor(types: dict[str, str]) -> dict[str, str]:
    """The type of each matrix; where blocks differ, which of them have which."""
    blocks: dict[str, dict[str, list[str]]] = {}
    for name, kind in types.items():
        block = re.match(r"blk\.(\d+)\.", name)
        stem = name.replace(block[0], "blk.*.") if block else name
        blocks.setdefault(stem, {}).setdefault(kind, []).append(block[1] if block else "")
    return {
        stem: next(iter(kinds))
        if len(kinds) == 1
        else "; ".join(f"{kind} in {', '.join(numbers)}" for kind, numbers in kinds.items())
        for stem, kinds in blocks.items()
        if set(kinds) != {"f32"}
    }


def _say(line: str) -> None:
    typer.echo(line, err=True)
