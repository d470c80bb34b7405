"""GGUF files of any program become checkpoints: the weights as `gguf` reads them, the tokens as llama.cpp has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from atlas.cli import main
from atlas.export import import_gguf as import_gguf_module
from atlas.export.gguf import export_gguf, tensor_names
from atlas.export.import_gguf import import_gguf
from atlas.export.llama_cpp import ask_llama_cpp
from atlas.export.vocabulary import add_metadata
from atlas.inference.load import load_model
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from tests.conftest import corpus
from tests.export.test_export import MODERN, needs_llama_cpp, sharp_model
from tests.export.test_vocabulary import TOKENIZERS, UNSEEN


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus()], 320)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A GGUF file with other metadata."""
    reader = gguf.GGUFReader(source)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = values.pop("general.architecture")
    change(values)
    writer = gguf.GGUFWriter(str(target), architecture)
    add_metadata(writer, values)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("quantize", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"])
def test_weights_are_those_in_the_file_and_a_model_of_atlas_comes_back(
    tmp_path: Path, bpe: ByteLevelTokenizer, quantize: str
) -> None:
    model = sharp_model(bpe, **(MODERN["qwen3-gqa"] | {"hidden_size": 256, "num_heads": 4}))
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize=quantize, chat_template="{{ messages[0].content }}")
    read, tokenizer, _ = import_gguf(tmp_path / "m.gguf")
    assert tokenizer.fingerprint == bpe.fingerprint
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    state = read.state_dict()
    names = {ours: theirs for ours, theirs in tensor_names(model.config).items() if ours in state}
    assert len(names) > 10
    for ours, theirs in names.items():
        expected = gguf.dequantize(there[theirs].data, there[theirs].tensor_type)
        assert np.array_equal(state[ours][: len(expected)].numpy(), expected), ours
    if quantize == "f32":
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@needs_llama_cpp
@pytest.mark.parametrize(
    "name", ["llama-bpe", "smollm", "qwen2", "sentencepiece", "sentencepiece with a blank"]
)
def test_the_tokenizer_and_the_text_are_llama_cpps(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TOKENIZERS[name]
    export_gguf(sharp_model(original, **MODERN["llama"]), original, tmp_path / "m.gguf", quantize="f32")
    assert main(["import", str(tmp_path / "m.gguf"), "--output-dir", str(tmp_path / "in")]) == 0
    assert "the tokenizer gives llama.cpp's token ids in" in capsys.readouterr().err
    loaded = load_model(tmp_path / "in" / "atlas_best.pt")
    assert loaded.tokenizer.encode_batch(UNSEEN) == original.encode_batch(UNSEEN)
    assert loaded.tokenizer.stop_ids == original.stop_ids
    assert loaded.tokenizer.begin_ids == original.begin_ids
    prompt = [*original.begin_ids, *original.encode("The river runs past")]
    answer = ask_llama_cpp(tmp_path / "m.gguf", [], [prompt], [12], context=64)
    said = prompt[:]
    for _ in range(12):
        said.append(int(loaded.logits(said)[-1].argmax()))
    assert said[len(prompt) :] == [step.token for step in answer.continuations[0]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda values: values.update({"llama.expert_count": 8}),
            "is a model with experts, which Atlas",
        ),
        (
            lambda values: values.update({"llama.rope.scaling.type": "yarn"}),
            "with RoPE scaled by the type yarn",
        ),
        (
            lambda values: values.update({"tokenizer.ggml.pre": "tekken"}),
            "its tokenizer splits a text by the rule tekken, which Atlas does not know: give the model's tokenizer",
        ),
        (
            lambda values: values.update({"llama.rope.scaling.factor": 8.0}),
            "with RoPE scaled by the type linear",
        ),
        (
            lambda values: values.update({"llama.rope.scale_linear": 4.0}),
            "with RoPE scaled by the type linear",
        ),
        (lambda values: values.update({"llama.attention.causal": False}), "with attention to later tokens"),
        (lambda values: values.update({"llama.rope.dimension_count": 4}), "with RoPE in a part of a head"),
        (
            lambda values: values.update({"llama.block_count": 0}),
            "llama.block_count 0: Input should be greater",
        ),
        (lambda values: values.pop("tokenizer.ggml.tokens"), "has no tokenizer.ggml.tokens"),
        (lambda values: values.update({"tokenizer.ggml.merges": ["a b c"]}), "its tokenizer is damaged"),
        (lambda values: values.update({"tokenizer.ggml.model": "t5"}), "its tokenizer is of the kind t5"),
        (lambda values: values.pop("llama.block_count"), "has no llama.block_count"),
    ],
)
def test_what_atlas_does_not_know_is_named(
    tmp_path: Path,
    bpe: ByteLevelTokenizer,
    change: Callable[[dict[str, Any]], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export_gguf(sharp_model(bpe, **MODERN["llama"]), bpe, tmp_path / "m.gguf", quantize="f32")
    file = rewritten(tmp_path / "m.gguf", tmp_path / "other.gguf", change)
    assert main(["import", str(file), "--output-dir", str(tmp_path / "in")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "in").exists()


def test_weights_that_are_not_finite_and_templates_that_are_not_jinja_are_named(
    tmp_path: Path, bpe: ByteLevelTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sharp_model(bpe, **MODERN["llama"])
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f32", chat_template="{% for")
    assert main(["import", str(tmp_path / "m.gguf"), "--output-dir", str(tmp_path / "in")]) == 0
    assert "warning: its chat template is not Jinja, so the model cannot chat" in capsys.readouterr().err
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    assert main(["import", str(tmp_path / "m.gguf"), "--output-dir", str(tmp_path / "nan")]) == 2
    assert "holds weights that are not finite" in capsys.readouterr().err


def test_another_byte_order_is_refused(
    tmp_path: Path, bpe: ByteLevelTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    export_gguf(sharp_model(bpe, **MODERN["llama"]), bpe, tmp_path / "m.gguf", quantize="f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "big.gguf"), "llama", endianess=gguf.GGUFEndian.BIG)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    del values["general.architecture"]
    add_metadata(writer, values)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["import", str(tmp_path / "big.gguf"), "--output-dir", str(tmp_path / "in")]) == 2
    assert "has the byte order of another machine" in capsys.readouterr().err


@needs_llama_cpp
def test_other_ids_than_llama_cpps_are_refused_and_a_named_tokenizer_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TOKENIZERS["qwen2"]
    file = tmp_path / "m.gguf"
    export_gguf(sharp_model(original, **MODERN["llama"]), original, file, quantize="f32")
    monkeypatch.setitem(import_gguf_module._EXPRESSIONS, "qwen2", r"\p{L}+|\p{N}|[^\p{L}\p{N}]+")
    assert main(["import", str(file), "--output-dir", str(tmp_path / "in")]) == 2
    assert "llama.cpp gives other token ids than the tokenizer" in capsys.readouterr().err
    original.save(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(f'{{"eos_token_id": 1, "vocab_size": {original.vocab_size}}}')
    named = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--output-dir", str(tmp_path / "named")]
    assert main(["import", str(file), *named]) == 0
    loaded = load_model(tmp_path / "named" / "atlas_best.pt")
    assert loaded.tokenizer.encode_batch(UNSEEN) == original.encode_batch(UNSEEN)
    capsys.readouterr()
    assert main(["import", str(file), "--tokenizer", "gpt2", "--output-dir", str(tmp_path / "gpt2")]) == 2
    assert "they are not from the same model" in capsys.readouterr().err
    assert main(["import", str(file), "--num-heads", "4", "--output-dir", str(tmp_path / "x")]) == 2
    assert "--num-heads and --config are for a checkpoint of Atlas 1.x" in capsys.readouterr().err
