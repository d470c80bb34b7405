"""`atlas export`: write a checkpoint as a GGUF file that Atlas verifies in llama.cpp, or as a folder in Hugging Face's
format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from atlas.cli import options
from atlas.cli.terminal import print_table, say
from atlas.errors import AtlasError
from atlas.export.quantize import Quantization
from atlas.files import encodable, explain_failed_write, local_path, read_limited
from atlas.outputs import place_of_file, replacing_output
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import CHAT_TEMPLATE

if TYPE_CHECKING:
    from atlas.export.score import Sample
    from atlas.inference.load import LoadedModel


def export(
    checkpoint: options.Checkpoint = options.BEST_CHECKPOINT,
    output: Annotated[
        str | None,
        typer.Option(
            help="The GGUF file to write; with --format hf or peft, the folder.",
            show_default="atlas_model.gguf, atlas_model",
        ),
    ] = None,
    format: Annotated[
        Literal["gguf", "hf", "peft"],
        typer.Option(
            help="gguf: a file for llama.cpp. hf: a folder for Hugging Face's transformers. "
            "peft: a folder with only the LoRA weights."
        ),
    ] = "gguf",
    quantize: Annotated[
        Quantization | None,
        typer.Option(
            help="Type of the matrices. f32 is exact. f16 and bf16 use 1/2 of f32's bytes, q8_0 1/4, q4_k_m 1/5.",
            show_default="gguf f16, hf f32",
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The model's licence, as an SPDX identifier such as mit.")
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="gguf: write a Modelfile for Ollama beside the GGUF file.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="gguf: run the file in llama.cpp (xllamacpp) and compare the results with PyTorch's."
        ),
    ] = True,
    data: Annotated[
        str | None,
        typer.Option(
            help="gguf: measure bits per byte on this text or prepared dataset, in llama.cpp and in PyTorch."
        ),
    ] = None,
) -> None:
    """Write a model with its tokenizer for other programs: a GGUF file, verified in llama.cpp, or a folder."""
    from atlas.inference.load import NOT_NEEDED, load_model
    from atlas.training.checkpoint.load import load_checkpoint
    from atlas.training.checkpoint.locate import find_checkpoint

    _check_options(format, quantize, modelfile, verify, data)
    target = local_path("--output", output or ("atlas_model.gguf" if format == "gguf" else "atlas_model"))
    path = find_checkpoint(checkpoint)
    contents = load_checkpoint(path, say=say, without=NOT_NEEDED)
    if contents["tokenizer"].get("kind") == "custom":
        raise AtlasError(
            f"{path}: was trained with data.tokenizer {contents['tokenizer'].get('name')}, custom code that an "
            "exported file cannot contain; to export a model, train with gpt2 or a tokenizer.json"
        )
    if format == "peft":
        from atlas.config.loader import resolve
        from atlas.export.peft import export_adapter

        config, weights = resolve(contents["config"]), contents["model_state_dict"]
        base = contents["data"].get("imported_from") or contents.get("initialized_from") or ""
        own = Tokenizer.from_checkpoint(contents)
        return _list_files(export_adapter(weights, config.model, config.lora, own, target, base=str(base)))
    loaded = load_model(path, contents=contents)
    if format == "hf":
        from atlas.export.huggingface import export_hf

        folder = export_hf(
            loaded.model,
            loaded.tokenizer,
            target,
            dtype=quantize or "f32",  # type: ignore[arg-type]
            name=encodable(target.name),
            facts=loaded.facts,
            license=license,
            chat_template=loaded.chat_template,
        )
        return _list_files(folder)
    if modelfile and loaded.chat_template and loaded.chat_template != CHAT_TEMPLATE:
        raise AtlasError(
            "--modelfile: the imported model has its own chat template, and Ollama uses another template "
            "language; leave --modelfile out and write TEMPLATE yourself"
        )
    sample = None
    if data is not None:
        from atlas.export.score import sample_of

        sample = sample_of(data, loaded.tokenizer, loaded.config.model.max_seq_len)
    export_and_prove(
        loaded, target, quantize=quantize or "f16", verify=verify, license=license, sample=sample
    )
    if modelfile:
        _write_modelfile(target, loaded)


def _check_options(
    format: str, quantize: str | None, modelfile: bool, verify: bool, data: str | None
) -> None:
    """Raise `AtlasError` for options that cannot be combined."""
    if data is not None and format != "gguf":
        raise AtlasError(f"--data: is for GGUF, which llama.cpp runs; omit --data with --format {format}")
    if data is not None and not verify:
        raise AtlasError(
            "--data: evaluates the file in llama.cpp, but --no-verify skips llama.cpp; omit one of the two options"
        )
    if format == "peft" and (quantize or modelfile):
        raise AtlasError("--format peft: takes no --quantize and no --modelfile; omit these options")
    if format == "hf" and quantize not in (None, "f32", "f16", "bf16"):
        raise AtlasError(f"--quantize {quantize}: is for GGUF; --format hf takes f32, f16 or bf16")
    if format == "hf" and modelfile:
        raise AtlasError("--modelfile: is for GGUF; Ollama cannot read a folder of --format hf")


_OLLAMA_CHAT = """\"\"\"{{ range .Messages }}<|{{ .Role }}|>
{{ .Content }}<|endoftext|>
{{ end }}<|assistant|>
\"\"\""""
"""`CHAT_TEMPLATE` in Ollama's template language. Unlike `CHAT_TEMPLATE`, this template keeps white space around a
message."""


_LARGEST_MODELFILE = 1 << 20  # bytes


def _write_modelfile(file: Path, loaded: LoadedModel) -> None:
    """Write a Modelfile for Ollama beside `file`. A chat model gets the chat template. For another model, the template
    is the unchanged prompt."""
    beside = file.with_name("Modelfile")
    target = place_of_file(beside)
    problem = "is not a Modelfile"
    with explain_failed_write(target, "move this file, or export into another folder", problem=problem):
        is_foreign = (
            not read_limited(target, limit=_LARGEST_MODELFILE).startswith(b"FROM ")
            if target.exists()
            else beside.is_symlink()  # the user has named the exported file, but not where this link leads
        )
    if is_foreign:
        raise AtlasError(
            f"{beside}: exists and is not a Modelfile; move this file, or export into another folder"
        )
    content = (
        f"FROM ./{file.name}\n"
        f"TEMPLATE {_OLLAMA_CHAT if loaded.chat_template == CHAT_TEMPLATE else '{{ .Prompt }}'}\n"
        f"PARAMETER num_ctx {loaded.config.model.max_seq_len}\n"
        "PARAMETER temperature 0.8\nPARAMETER top_k 50\nPARAMETER top_p 0.95\n"
    )
    with (
        explain_failed_write(target, "export into another folder"),
        replacing_output(target) as temporary,
    ):
        temporary.write_bytes(content.encode("utf-8", "surrogateescape"))
    typer.echo(target)


def _list_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        say(f"{path.name:<26} {path.stat().st_size:>13,} bytes")
    typer.echo(folder)


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
    """Write the GGUF file `output` and print its path.

    With `verify`, compare the results of llama.cpp with the results of `loaded`, and print the bits per byte of
    `sample` for both.

    Raises `AtlasError` if the results differ. The file remains for inspection.
    """
    from atlas.export.gguf import export_gguf
    from atlas.tokenizer.foreign import ForeignTokenizer

    types = export_gguf(
        loaded.model,
        loaded.tokenizer,
        output,
        quantize=quantize,
        name=encodable(output.stem),
        license=license,
        chat_template=loaded.chat_template,
    )
    counts = Counter(types.values())
    rows = {
        "architecture": str(loaded.config.model.gguf_architecture),
        "tensors": f"{len(types)}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}",
        "size": f"{output.stat().st_size / 1e6:,.1f} MB",
    }
    if len(counts) > 2:  # the matrices have several types
        rows |= _types_by_tensor(types)
    print_table(list(rows.items()), err=True)
    if quantize.startswith("q") and (in_f16 := counts["f16"]):
        say(
            f"note: {in_f16} matrices are f16, not {quantize}: the length of their rows is not a multiple of 32; "
            "to quantize these matrices, train with a hidden_size that is a multiple of 32"
        )
    if isinstance(loaded.tokenizer, ForeignTokenizer) and loaded.tokenizer.is_nfc:
        say(
            "note: the tokenizer converts a text to Unicode's NFC, which llama.cpp does not: there, letters that are "
            "written with separate accents get other token ids"
        )
    if loaded.config.model.mlp == "gelu_exact":
        say(
            "model.mlp gelu_exact: llama.cpp computes the tanh approximation of GELU, which differs by at most 5e-4; "
            "--data TEXT measures the effect on bits per byte"
        )
    if verify:
        _prove(loaded, output, quantize, texts, sample)
    else:
        say("not verified: --no-verify")
    typer.echo(output)


def _prove(
    loaded: LoadedModel, output: Path, quantize: Quantization, texts: Sequence[str], sample: Sample | None
) -> None:
    from atlas.export.llama_cpp import is_available
    from atlas.export.verify import verify_gguf

    if not is_available():
        say('NOT VERIFIED: llama.cpp is not installed; pip install "atlas-llm[llama]", then export again')
        return
    proof = verify_gguf(output, loaded.model, loaded.tokenizer, quantize=quantize, texts=texts)
    say(str(proof))
    if not proof.holds:
        failed = ", ".join(name for name, agrees, _ in proof.checks if not agrees)
        remedy = "do not use this file" if quantize == "f32" else "try --quantize f32"
        raise AtlasError(f"{output}: llama.cpp's results differ from the model's ({failed}); {remedy}")
    say("proved: llama.cpp's results equal the model's")
    if sample:
        from atlas.export.score import llama_cpp_logprobs, pytorch_logprobs

        theirs, ours = llama_cpp_logprobs(output, sample), pytorch_logprobs(loaded.model, sample)
        say(
            f"bits per byte  {sample.bits_per_byte(theirs):.4f} in llama.cpp, {sample.bits_per_byte(ours):.4f} in "
            f"PyTorch with the checkpoint's own weights, on {sample.num_tokens:,} tokens of {sample.name}"
        )


def _types_by_tensor(types: dict[str, str]) -> dict[str, str]:
    """Return a dict: name of a matrix → its type. If the type differs between blocks, the value lists the blocks of
    each type."""
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
