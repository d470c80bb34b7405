"""GGUF files: as other readers see them, in llama.cpp against PyTorch, and a proof that can fail."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.cli import main
from atlas.config import AtlasConfig, ModelConfig
from atlas.errors import AtlasError, ExportError
from atlas.export import gguf as module
from atlas.export import llama_cpp, verify
from atlas.export.gguf import export_gguf, file_tensors, read_gguf
from atlas.export.huggingface import export_hf
from atlas.export.llama_cpp import Answer, Step, ask_llama_cpp
from atlas.export.quantize import QUANTIZATIONS
from atlas.export.verify import Proof, verify_gguf
from atlas.model import AtlasLM, build_model
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.tokenizer.bpe import BPETokenizer
from atlas.tokenizer.byte_level import CHAR_OF_BYTE
from atlas.training.checkpoint.manager import CheckpointManager
from tests.conftest import corpus
from tests.model.test_llama_qwen import their_names
from tests.toy import CharacterTokenizer

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.is_available(), reason="xllamacpp is not installed: pip install atlas-llm[llama]"
)


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus(), "def f(x):\n\treturn x ** 2\n" * 20, "naïve 漢字 🙂 " * 20], 400)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def sharp_model(tokenizer: Tokenizer, **shape: object) -> AtlasLM:
    """Every parameter its own random number, and logits with clear favourites, so that no fault hides."""
    base = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 48}
    model = build_model(ModelConfig(**(base | shape | {"vocab_size": tokenizer.vocab_size})), seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + noise / 4 if "norm.weight" in name else noise / 5)
        model.token_embedding.weight[tokenizer.vocab_size :] = 0
    return model


SHAPES = (
    {"bias": True, "tie_embeddings": True},
    {"bias": False, "tie_embeddings": False},
)
ROTATED = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "max_seq_len": 128}
MODERN = {
    "llama": ROTATED,
    "llama-gqa": ROTATED
    | {"num_kv_heads": 2, "rope_theta": 500.0, "tie_embeddings": False, "norm_eps": 1e-6},
    "llama-wide-heads": ROTATED | {"num_kv_heads": 1, "head_dim": 12, "mlp_size": 72},
    "qwen3": ROTATED | {"qk_norm": True},
    "qwen3-gqa": ROTATED | {"qk_norm": True, "num_kv_heads": 2, "head_dim": 16, "tie_embeddings": False},
}


# The file, as the reader of the `gguf` package sees it.

HUGGING_FACE_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "attention_norm": "transformer.h.{}.ln_1",
    "attention.qkv": "transformer.h.{}.attn.c_attn",
    "attention.output": "transformer.h.{}.attn.c_proj",
    "mlp_norm": "transformer.h.{}.ln_2",
    "mlp.up": "transformer.h.{}.mlp.c_fc",
    "mlp.down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def name_in_file(name: str, num_layers: int) -> str:
    """What llama.cpp's converter calls a tensor of GPT-2's, by way of its name in `transformers`."""
    layer = re.match(r"blocks\.(\d+)\.", name)
    stem, kind = name.removeprefix(layer[0] if layer else "").rsplit(".", 1)
    converter = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, num_layers)
    return f"{converter.get_name(HUGGING_FACE_NAMES[stem].format(layer and layer[1]))}.{kind}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantize", ["f32", "f16"])
def test_every_tensor_in_the_file_is_the_model_s(
    tmp_path: Path, bpe: ByteLevelTokenizer, quantize: str, shape: dict
) -> None:
    model = sharp_model(bpe, **shape)
    written = export_gguf(model, bpe, tmp_path / "m.gguf", quantize=quantize)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    state = model.state_dict()
    for name, tensor in state.items():
        expected = tensor.numpy()
        if name in ("token_embedding.weight", "lm_head.weight"):
            expected = expected[: bpe.vocab_size]
            assert len(expected) < len(tensor)  # so that the cropping is seen
        half = quantize == "f16" and expected.ndim == 2 and name != "position_embedding.weight"
        data = found.pop(name_in_file(name, 2)).data
        assert data.dtype == (np.float16 if half else np.float32)
        np.testing.assert_array_equal(data, expected.astype(data.dtype))
    assert bool(found) is not shape["bias"]
    assert all(name.endswith(".bias") and not tensor.data.any() for name, tensor in found.items())
    assert written.keys() == {tensor.name for tensor in reader.tensors}


@pytest.mark.parametrize("name", MODERN)
def test_modern_tensors_are_where_llama_cpp_looks_for_them(
    tmp_path: Path, bpe: ByteLevelTokenizer, name: str
) -> None:
    """By their names in `transformers`. The order of rows is tested in llama.cpp below."""
    model = sharp_model(bpe, **MODERN[name])
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    converter = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.split("-")[0].upper()], 2)
    state = model.state_dict()
    for ours, parts in their_names(model.config).items():
        rows = state[ours].numpy()
        for part in parts:
            stem, _, kind = part.rpartition(".")
            data = found.pop(f"{converter.get_name(stem)}.{kind}")
            expected, rows = rows[: len(data)], rows[len(data) :]
            if name.startswith("llama") and ("q_proj" in part or "k_proj" in part):
                data, expected = np.sort(data, axis=0), np.sort(expected, axis=0)
            np.testing.assert_array_equal(data, expected)
    assert not found


def test_metadata_is_what_llama_cpp_needs(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model = sharp_model(bpe)
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f16", name="river")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "gpt2",
        "general.name": "river",
        "general.file_type": 1,
        "gpt2.context_length": 48,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": bpe.eos_id,
        "tokenizer.ggml.eos_token_id": bpe.eos_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in bpe.merges()],
    }
    assert {name: fields[name] for name in expected} == expected
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[bpe.eos_id] == "<|endoftext|>"
    assert tokens[bpe.encode(" river")[0]].startswith("Ġ")
    assert [id for id, type in enumerate(types) if type != gguf.TokenType.NORMAL] == [bpe.eos_id]
    assert types[bpe.eos_id] == gguf.TokenType.CONTROL


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model = sharp_model(bpe, bias=False)
    for name in ("a.gguf", "b.gguf"):
        export_gguf(model, bpe, tmp_path / name, name="same")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("shape", [*SHAPES, *MODERN.values()])
def test_a_file_read_back_computes_what_the_model_computes(
    tmp_path: Path, bpe: ByteLevelTokenizer, shape: dict
) -> None:
    model = sharp_model(bpe, **shape)
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f32")
    read, _ = read_gguf(tmp_path / "m.gguf")
    assert read.config.gguf_architecture == model.config.gguf_architecture
    tokens = torch.randint(bpe.vocab_size, (2, 48))
    torch.testing.assert_close(read(tokens), model(tokens), rtol=0, atol=1e-5)


def test_the_name_table_covers_the_state_dict_exactly(
    monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer
) -> None:
    model = sharp_model(bpe)
    for row in list(module.TENSOR_NAMES["gpt2"]):
        if row == "lm_head.weight":
            continue
        table = {name: other for name, other in module.TENSOR_NAMES["gpt2"].items() if name != row}
        monkeypatch.setitem(module.TENSOR_NAMES, "gpt2", table)
        with pytest.raises(ValueError, match=re.escape(row.format(0))):
            file_tensors(model)
        monkeypatch.undo()
    model.blocks[1].register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"blocks\.1\.gate"):
        file_tensors(model)


# What cannot be exported, and what cannot be written.


def refused(folder: Path, model: AtlasLM, tokenizer: Tokenizer, **options: object) -> str:
    with pytest.raises(AtlasError) as refusal:
        export_gguf(model, tokenizer, folder / "m.gguf", **options)
    assert list(folder.iterdir()) == []
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_model_that_a_gguf_file_cannot_hold_is_refused_with_the_reason(
    tmp_path: Path, bpe: ByteLevelTokenizer
) -> None:
    custom = Tokenizer.wrap(CharacterTokenizer())
    assert "custom code" in refused(tmp_path, sharp_model(custom), custom)
    model = sharp_model(bpe)
    between = sharp_model(bpe, **(ROTATED | {"mlp": "gelu"}))
    assert "for Atlas only: " in refused(tmp_path, between, bpe)
    assert "for llama, set model.mlp to swiglu" in refused(tmp_path, between, bpe)
    smaller = BPETokenizer("bpe", bpe.token_strings()[:-1], bpe.merges()[:-1], bpe.eos_id)
    assert "vocab_size" in refused(tmp_path, model, smaller)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = 1e5
    assert "--quantize f32" in refused(tmp_path, model, bpe, quantize="f16")
    export_gguf(model, bpe, tmp_path / "f32" / "m.gguf", quantize="f32")
    (tmp_path / "f32" / "m.gguf").unlink()
    (tmp_path / "f32").rmdir()
    with torch.no_grad():
        model.blocks[1].mlp_norm.bias[3] = float("nan")
    assert "blk.1.ffn_norm.bias" in refused(tmp_path, model, bpe, quantize="f32")


def test_a_setting_that_no_table_names_makes_the_model_train_only(
    tmp_path: Path, bpe: ByteLevelTokenizer
) -> None:
    """A new field cannot be exported as if it were not there, not even at its default."""

    class Capped(ModelConfig):
        logit_cap: float = 0.0

    for changes in ({}, *MODERN.values()):
        model = sharp_model(bpe, **changes)
        assert model.config.train_only is None
        model.config = Capped(**model.config.model_dump())
        assert model.config.gguf_architecture is None
        reason = "the table of llama.cpp's architectures does not name model.logit_cap: remove this setting"
        assert model.config.train_only == reason
        assert reason in refused(tmp_path, model, bpe)
        with pytest.raises(ExportError, match=re.escape(reason)):
            export_hf(model, bpe, tmp_path / "hf")
        assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(0, 0, 50_000))
    assert "0.1 MB are free" in refused(tmp_path, sharp_model(bpe), bpe)


def test_a_disk_that_fills_while_writing_leaves_the_old_file_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer
) -> None:
    output = tmp_path / "m.gguf"
    export_gguf(sharp_model(bpe), bpe, output)
    before, calls = output.read_bytes(), []

    def full(data: np.ndarray, type: gguf.GGMLQuantizationType) -> np.ndarray:
        calls.append(type)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return data.astype(np.float16 if type == gguf.GGMLQuantizationType.F16 else np.float32)

    monkeypatch.setattr(module.gguf, "quantize", full)
    with pytest.raises(AtlasError, match="No space left"):
        export_gguf(sharp_model(bpe), bpe, output)
    assert len(calls) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert output.read_bytes() == before


def test_an_export_never_takes_the_place_of_something_else(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model, other = sharp_model(bpe), tmp_path / "atlas_best.pt"
    other.write_bytes(b"PK\x03\x04 weeks of training")
    with pytest.raises(AtlasError, match="is not a GGUF file"):
        export_gguf(model, bpe, other)
    assert other.read_bytes().endswith(b"weeks of training")
    for impossible in (other / "m.gguf", tmp_path):  # below a file; in place of a folder
        with pytest.raises(AtlasError, match=r"cannot be written|which Atlas does not replace"):
            export_gguf(model, bpe, impossible)
    assert sorted(path.name for path in tmp_path.parent.glob("*.tmp")) == []


@pytest.fixture(scope="module")
def complete_file(tmp_path_factory: pytest.TempPathFactory, bpe: ByteLevelTokenizer) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    export_gguf(sharp_model(bpe), bpe, path)
    return path.read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_file_cut_off_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, complete_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(complete_file[: data.draw(st.integers(0, len(complete_file) - 64))])
    with pytest.raises(AtlasError, match="is not a complete GGUF file"):
        read_gguf(path)


def test_other_files_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AtlasError, match="architecture bert"):
        read_gguf(tmp_path / "bert.gguf")


# The proof in llama.cpp.


def proof_of(
    folder: Path,
    model: AtlasLM,
    tokenizer: Tokenizer,
    quantize: str = "f32",
    file: Callable[[], tuple[AtlasLM, Tokenizer]] | None = None,
    **options: object,
) -> Proof:
    """The proof of `model` over its own export, or over that of what `file` makes."""
    exported = file() if file else (model, tokenizer)
    export_gguf(*exported, folder / "m.gguf", quantize=quantize)
    return verify_gguf(folder / "m.gguf", model, tokenizer, quantize=quantize, **options)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("quantize", "shape"),
    [
        ("f32", {"max_seq_len": 128}),
        ("f16", {"max_seq_len": 128}),
        ("f32", {"max_seq_len": 32, "bias": False, "tie_embeddings": False}),
        ("f16", {"max_seq_len": 64, "bias": False, "num_heads": 1}),
        ("f16", {"max_seq_len": 64, "mlp": "gelu_exact"}),
        *(("f32", shape) for shape in MODERN.values()),
        ("f16", MODERN["qwen3-gqa"]),
        *(pytest.param("f16", shape, marks=pytest.mark.slow) for shape in MODERN.values()),
    ],
)
def test_llama_cpp_computes_what_the_model_computes(
    tmp_path: Path, bpe: ByteLevelTokenizer, quantize: str, shape: dict
) -> None:
    proof = proof_of(tmp_path, sharp_model(bpe, **shape), bpe, quantize, texts=["The river runs.\n\tVerse 7"])
    assert proof.holds, str(proof)
    assert proof.largest_difference < (5e-3 if quantize == "f32" or "position" not in shape else 2e-2)
    assert proof.num_logprobs > 100
    assert (proof.largest_drift > proof.mean_drift > 0) is ("drift" in str(proof)) is (quantize != "f32")
    context = shape["max_seq_len"]
    assert proof.num_steps >= min(100, context - 1) + 3 * min(100, context - max(16, context // 2))


@needs_llama_cpp
def test_llama_cpp_computes_what_a_model_with_gpt2_s_vocabulary_computes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proof = proof_of(
        tmp_path, sharp_model(Tokenizer.gpt2(), hidden_size=16), Tokenizer.gpt2(), "f16", max_tokens=8
    )
    assert proof.holds, str(proof)
    assert capfd.readouterr().out == ""


@needs_llama_cpp
def test_tokens_that_are_half_a_character_are_compared_too(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    half = bpe.token_strings().index(CHAR_OF_BYTE["🙂".encode()[0]])
    model = sharp_model(bpe, tie_embeddings=False)
    with torch.no_grad():
        model.final_norm.bias[0] = 5
        model.lm_head.weight[half, 0] = 5
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f32")
    proof = verify_gguf(tmp_path / "m.gguf", model, bpe, quantize="f32", max_tokens=10)
    assert proof.holds, str(proof)
    assert proof.num_logprobs == 10 * proof.num_steps


@needs_llama_cpp
def test_greedy_text_continues_after_an_end_of_text(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model = sharp_model(bpe, tie_embeddings=False)
    with torch.no_grad():
        model.final_norm.bias[0] = 5
        model.lm_head.weight[bpe.eos_id, 0] = 5
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f32")
    answer = ask_llama_cpp(tmp_path / "m.gguf", [], [[1, 2]], [20], context=48)
    assert [step.token for step in answer.continuations[0]].count(bpe.eos_id) > 10
    assert len(answer.continuations[0]) == 20
    assert verify_gguf(tmp_path / "m.gguf", model, bpe, quantize="f32").holds


@needs_llama_cpp
@settings(max_examples=5, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=20, max_size=20))
def test_llama_cpp_gives_the_ids_of_any_text(
    tmp_path_factory: pytest.TempPathFactory, bpe: ByteLevelTokenizer, complete_file: bytes, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("ids") / "m.gguf"
    path.write_bytes(complete_file)
    assert ask_llama_cpp(path, texts, [], [], context=48).token_ids == bpe.encode_batch(texts)


@needs_llama_cpp
def test_what_llama_cpp_refuses_is_reported_in_one_line(tmp_path: Path, complete_file: bytes) -> None:
    (tmp_path / "cut.gguf").write_bytes(complete_file[: len(complete_file) // 2])
    with pytest.raises(
        AtlasError, match=r"llama\.cpp cannot run it: .*not within the file bounds"
    ) as refusal:
        ask_llama_cpp(tmp_path / "cut.gguf", [], [], [], context=48)
    assert "\n" not in str(refusal.value)


# A proof that cannot fail is no proof.


def with_swapped_norms(model: AtlasLM) -> None:
    first, second = model.blocks[0].attention_norm.weight, model.blocks[1].attention_norm.weight
    first.data, second.data = second.data, first.data


def with_one_weight_changed(model: AtlasLM) -> None:
    model.blocks[1].attention.qkv.weight.data[7, 3] += 0.01


def with_another_epsilon(model: AtlasLM) -> None:
    model.config = model.config.model_copy(update={"norm_eps": 1e-6})


@needs_llama_cpp
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (with_swapped_norms, {"blk.0.attn_norm.weight", "blk.1.attn_norm.weight"}),
        (with_one_weight_changed, {"blk.1.attn_qkv.weight"}),
        (with_another_epsilon, {"gpt2.attention.layer_norm_epsilon"}),
    ],
)
def test_a_damaged_file_fails(
    tmp_path: Path, bpe: ByteLevelTokenizer, damage: Callable[[AtlasLM], None], named: set[str]
) -> None:
    def damaged() -> tuple[AtlasLM, Tokenizer]:
        copy = sharp_model(bpe)
        damage(copy)
        return copy, bpe

    proof = proof_of(tmp_path, sharp_model(bpe), bpe, "f16", damaged, max_tokens=2)
    assert not proof.holds
    assert set(proof.file_differences) == named
    assert "DIFFERENT  file" in str(proof)


@needs_llama_cpp
def test_shuffled_merges_fail_in_the_file_and_in_llama_cpp(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    merges = bpe.merges()
    random.Random(0).shuffle(merges)
    shuffled = BPETokenizer("bpe", bpe.token_strings(), merges, bpe.eos_id)
    model = sharp_model(bpe)
    proof = proof_of(tmp_path, model, bpe, file=lambda: (model, shuffled), max_tokens=2)
    assert not proof.holds
    assert proof.file_differences == ("tokenizer.ggml.merges",)
    assert proof.text_differences


@needs_llama_cpp
@pytest.mark.parametrize("quantize", ["f32", "f16"])
def test_another_computation_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer, quantize: str
) -> None:
    """The file is right, but PyTorch splits heads differently from llama.cpp: only running both shows it."""

    def read_wrongly(path: Path) -> tuple[AtlasLM, dict]:
        model, metadata = read_gguf(path)
        attention = model.blocks[1].attention
        attention.head_size = 16
        return model, metadata

    monkeypatch.setattr(verify, "read_gguf", read_wrongly)
    proof = proof_of(tmp_path, sharp_model(bpe), bpe, quantize)
    assert not proof.file_differences
    assert not proof.text_differences
    assert not proof.holds
    assert "DIFFERENT  log-probabilities" in str(proof)


@needs_llama_cpp
def test_activations_beyond_f16_fail_the_f16_file_and_not_the_f32_file(
    tmp_path: Path, bpe: ByteLevelTokenizer
) -> None:
    """Not made up: weights that f16 holds well, and sums that it does not."""
    model = sharp_model(bpe)
    with torch.no_grad():
        model.blocks[0].mlp.up.bias += 70_000
        model.blocks[0].mlp.down.weight *= 1e-4
    assert proof_of(tmp_path, model, bpe, "f32", max_tokens=5).holds
    proof = proof_of(tmp_path, model, bpe, "f16", max_tokens=5)
    assert not proof.file_differences
    assert not proof.holds


def told(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[AtlasLM, list[int], list[Step]], list[Step]]
) -> None:
    """An llama.cpp that computes as PyTorch does, its steps then changed."""

    def answer(
        path: Path, texts: list[str], prompts: list[list[int]], lengths: list[int], **_: object
    ) -> Answer:
        model, metadata = read_gguf(path)
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        tokenizer = BPETokenizer("bpe", tokens, merges, metadata["tokenizer.ggml.eos_token_id"])
        continuations = []
        for prompt, length in zip(prompts, lengths, strict=True):
            ids, steps = list(prompt), []
            for _step in range(length):
                row = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
                steps.append(Step(int(row.argmax()), dict(enumerate(row.tolist()))))
                steps = change(model, ids, steps)
                ids.append(steps[-1].token)
            continuations.append(steps)
        return Answer(tokenizer.encode_batch(texts), continuations, [])

    monkeypatch.setattr(verify, "ask_llama_cpp", answer)


def test_a_second_choice_is_a_near_tie_only_below_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer
) -> None:
    def second_choice(model: AtlasLM, ids: list[int], steps: list[Step]) -> list[Step]:
        second = sorted(steps[-1].logprobs, key=steps[-1].logprobs.__getitem__)[-2]
        return [*steps[:-1], dataclasses.replace(steps[-1], token=second)]

    told(monkeypatch, second_choice)
    clear = sharp_model(bpe, tie_embeddings=False)
    proof = proof_of(tmp_path, clear, bpe, max_tokens=3)
    assert proof.wrong_steps == proof.num_steps == 12
    assert not proof.holds

    close = sharp_model(bpe, tie_embeddings=False)
    with torch.no_grad():  # hardly anything to choose between the tokens
        close.lm_head.weight *= 1e-4
    proof = proof_of(tmp_path, close, bpe, max_tokens=3)
    assert (proof.wrong_steps, proof.near_ties) == (0, 12)
    assert proof.holds


@pytest.mark.parametrize("wrong", [float("nan"), 0.0])
def test_a_log_probability_that_is_off_or_no_number_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer, wrong: float
) -> None:
    def one_off(model: AtlasLM, ids: list[int], steps: list[Step]) -> list[Step]:
        if len(ids) == 4:
            steps[-1].logprobs[7] = wrong
        return steps

    told(monkeypatch, one_off)
    proof = proof_of(tmp_path, sharp_model(bpe), bpe, max_tokens=5)
    assert not proof.wrong_steps
    assert not proof.holds


def test_nothing_compared_proves_nothing(
    tmp_path: Path, bpe: ByteLevelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, lambda model, ids, steps: steps)
    assert proof_of(tmp_path, sharp_model(bpe), bpe, max_tokens=3).holds
    assert not proof_of(tmp_path, sharp_model(bpe), bpe, max_tokens=0).holds


# The command.


@pytest.fixture
def checkpoint(tmp_path: Path, bpe: ByteLevelTokenizer) -> Path:
    return save_checkpoint(tmp_path / "checkpoints", bpe)


def save_checkpoint(folder: Path, tokenizer: Tokenizer, **shape: object) -> Path:
    model = sharp_model(tokenizer, **shape)
    contents = {
        "format_version": 1,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {},
        "config": AtlasConfig(model=model.config).model_dump(mode="json"),
        "tokenizer": tokenizer.state(),
        "data": {},
        "step": 1,
        "epoch": 0,
        "loss": 1.0,
        "sequences_consumed": 8,
        "horizon": 9,
    }
    manager = CheckpointManager(folder)
    return next(path for path in manager.save(contents, ["best"]) if path.suffix == ".pt")


@needs_llama_cpp
def test_export_writes_the_file_and_prints_the_proof(
    tmp_path: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "river.gguf"
    alias = checkpoint.with_name("best_model.pt")
    assert main(["export", "--checkpoint", str(alias), "--output", str(output), "--quantize", "f32"]) == 0
    said = capfd.readouterr()
    assert said.out.split() == [str(output)]
    assert "28 f32" in said.err
    assert "proved" in said.err
    assert gguf.GGUFReader(output).fields["general.name"].contents() == "river"


def test_no_verify_and_a_missing_llama_cpp_are_reported(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "m.gguf")]
    assert main([*command, "--no-verify"]) == 0
    assert "not verified: --no-verify" in capsys.readouterr().err
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "NOT VERIFIED" in said
    assert 'pip install "atlas-llm[llama]"' in said


def test_a_failed_proof_is_an_error_that_names_what_failed(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_ids(path: Path, texts: list[str], prompts: list, lengths: list, **_: object) -> Answer:
        return Answer([[0]] * len(texts), [[] for _ in prompts], [])

    monkeypatch.setattr(llama_cpp, "is_available", lambda: True)
    monkeypatch.setattr(verify, "ask_llama_cpp", other_ids)
    output = tmp_path / "m.gguf"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(output)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(r"error: .*m\.gguf.*\(token ids, log-probabilities, greedy text\)", said.err)
    assert output.exists()


def test_a_checkpoint_of_a_custom_tokenizer_is_refused_by_its_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path, Tokenizer.resolve("tests.toy:tokenizer"))
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "m.gguf")]) == 2
    said = capsys.readouterr().err
    assert "data.tokenizer tests.toy:tokenizer" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "m.gguf").exists()


def test_the_script_is_the_command(tmp_path: Path, checkpoint: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "export_gguf.py"
    output = tmp_path / "m.gguf"
    subprocess.run(
        [sys.executable, script, "--checkpoint", checkpoint, "--output", output, "--no-verify"],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
    )
    assert output.exists()


def test_the_command_takes_every_type_that_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--quantize", "q3"]) == 2
    assert ", ".join(f"'{kind}'" for kind in QUANTIZATIONS) in capsys.readouterr().err
