"""Quantized GGUF: which tensor gets which type, the bytes as ggml itself writes them, and the proof in llama.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType

from atlas.cli import main
from atlas.errors import AtlasError
from atlas.export import quantize as module
from atlas.export.gguf import export_gguf
from atlas.export.quantize import QUANTIZATIONS, as_type, num_bytes, tensor_type
from atlas.export.verify import verify_gguf
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from tests.conftest import corpus
from tests.export.test_export import MODERN, needs_llama_cpp, save_checkpoint, sharp_model

LOSS = {
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q5_1": 0.06,
    "Q5_0": 0.07,
    "Q4_K": 0.1,
    "Q4_1": 0.11,
    "Q4_0": 0.13,
}
"""The largest part of a normal matrix that each type may lose, in root mean square."""


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus()], 400)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def types_of(
    quantize: str, *, columns: int = 256, num_layers: int = 12, is_tied: bool = True
) -> dict[str, str]:
    names = ["token_embd", "output", "position_embd", "output_norm"]
    names += [
        f"blk.{n}.{part}" for n in range(num_layers) for part in ("attn_qkv", "attn_v", "attn_q", "ffn_down")
    ]
    return {
        name: tensor_type(
            f"{name}.weight",
            (columns,) if name.endswith("norm") else (64, columns),
            quantize,  # type: ignore[arg-type]
            num_layers=num_layers,
            is_tied=is_tied,
        ).name
        for name in names
    }


def test_types_are_those_of_llama_quantize() -> None:
    """As in its source, computed by hand for 12 layers: more bits in 0, 3, 6, 9, 10 and 11."""
    mixture = types_of("q4_k_m")
    assert [mixture[f"blk.{n}.ffn_down"] for n in range(12)] == [
        *("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K")
    ]
    for part in ("attn_v", "attn_qkv"):
        assert all(mixture[f"blk.{n}.{part}"] == mixture[f"blk.{n}.ffn_down"] for n in range(12))
    assert {mixture[f"blk.{n}.attn_q"] for n in range(12)} == {"Q4_K"}
    assert (mixture["token_embd"], mixture["position_embd"], mixture["output_norm"]) == ("Q6_K", "F32", "F32")
    untied = types_of("q5_k_m", is_tied=False)
    assert (untied["token_embd"], untied["output"], untied["blk.1.attn_v"]) == ("Q5_K", "Q6_K", "Q5_K")
    assert types_of("q8_0")["token_embd"] == "Q8_0"
    assert types_of("q4_0")["token_embd"] == "Q6_K"
    assert set(types_of("q4_0").values()) == {"Q4_0", "Q6_K", "F32"}
    assert types_of("bf16")["blk.0.attn_q"] == "BF16"


def test_rows_of_incomplete_blocks_fall_back_as_in_llama_cpp() -> None:
    narrow = types_of("q4_k_m", columns=96, is_tied=False)
    assert (narrow["blk.1.ffn_down"], narrow["blk.0.ffn_down"], narrow["output"]) == ("Q5_0", "Q8_0", "Q8_0")
    assert types_of("q5_k_m", columns=96)["blk.1.ffn_down"] == "Q5_1"
    assert types_of("q6_k", columns=96)["blk.1.ffn_down"] == "Q8_0"
    assert types_of("q4_0", columns=96)["token_embd"] == "Q8_0"
    for quantize in QUANTIZATIONS[3:]:
        assert types_of(quantize, columns=80)["blk.1.ffn_down"] == "F16"


@needs_llama_cpp
@pytest.mark.parametrize("name", LOSS)
def test_ggml_and_gguf_agree_on_the_bytes(name: str) -> None:
    """One writes, the other reads; of the simple types both write."""
    kind = TensorType[name]
    rows = np.random.default_rng(1).normal(size=(32, 512)).astype(np.float32)
    data = as_type(rows, kind)
    assert data.nbytes == num_bytes(rows.size, kind)
    read = gguf.dequantize(data, kind)
    assert float(np.sqrt(((read - rows) ** 2).mean())) < LOSS[name]
    if kind not in module._FALLBACKS:
        theirs = np.empty_like(data)
        module._ggml(name)(int(kind), rows.ctypes.data, theirs.ctypes.data, 0, 32, 512, None)
        np.testing.assert_array_equal(data, theirs)


@needs_llama_cpp
@pytest.mark.parametrize("quantize", QUANTIZATIONS[2:])
@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("qwen3", marks=pytest.mark.slow),
    ],
)
def test_llama_cpp_computes_what_the_model_computes(
    tmp_path: Path, bpe: ByteLevelTokenizer, name: str, quantize: str
) -> None:
    """Of 256 numbers a row, and in gpt2 of 64, for which K-quants fall back."""
    shape = MODERN[name] | {"hidden_size": 256} if name in MODERN else {"hidden_size": 64, "max_seq_len": 128}
    model = sharp_model(bpe, **(shape | {"num_layers": 1}))
    written = export_gguf(model, bpe, tmp_path / "m.gguf", quantize=quantize)  # type: ignore[arg-type]
    kinds = set(written.values()) - {"f32"}
    assert kinds <= {TensorType[kind].name.lower() for kind in (*LOSS, "BF16")}
    proof = verify_gguf(tmp_path / "m.gguf", model, bpe, quantize=quantize, max_tokens=30)  # type: ignore[arg-type]
    assert proof.holds, str(proof)


@needs_llama_cpp
@pytest.mark.parametrize("hidden_size", [40, 72, 80, 100])
@pytest.mark.parametrize(
    "quantize",
    [
        pytest.param(each, marks=[] if each in ("q8_0", "q4_0", "q4_k_m") else pytest.mark.slow)
        for each in QUANTIZATIONS
    ],
)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"max_seq_len": 128}, id="gpt2"),
        pytest.param(MODERN["qwen3-gqa"] | {"head_dim": 32}, id="qwen3", marks=pytest.mark.slow),
    ],
)
def test_rows_that_32_does_not_divide_are_proved_in_llama_cpp(
    tmp_path: Path, bpe: ByteLevelTokenizer, shape: dict[str, object], quantize: str, hidden_size: int
) -> None:
    """Some matrices are quantized and others f16: each type has its own rounding, which the proof must follow."""
    model = sharp_model(bpe, **(shape | {"hidden_size": hidden_size, "num_layers": 1}))
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize=quantize)  # type: ignore[arg-type]
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        block_length, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        assert tensor.shape[0] % block_length == 0
        if quantize.startswith("q") and len(tensor.shape) == 2 and tensor.name != "position_embd.weight":
            assert (tensor.tensor_type == TensorType.F16) == (tensor.shape[0] % 32 != 0), tensor.name
    proof = verify_gguf(tmp_path / "m.gguf", model, bpe, quantize=quantize, max_tokens=30)  # type: ignore[arg-type]
    assert proof.holds, str(proof)


@needs_llama_cpp
@pytest.mark.parametrize("quantize", ["q8_0", "q4_0", "q4_k_m"])
def test_the_command_exports_any_width_and_lists_matrices_in_f16(
    tmp_path: Path, bpe: ByteLevelTokenizer, quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoints", bpe, hidden_size=40)
    command = ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "m.gguf")]
    assert main([*command, "--quantize", quantize]) == 0
    said = capsys.readouterr().err
    # Of two layers the matrices of attention and the first of the MLP have rows of 40, the last of the MLP of 160.
    assert (
        f"note: 7 matrices are f16, not {quantize}: the length of their rows is not a multiple of 32" in said
    )
    assert "proved: llama.cpp's results equal the model's" in said
    assert main([*command, "--quantize", "f16"]) == 0
    assert "note:" not in capsys.readouterr().err


def test_k_quants_without_ggml_are_refused(
    tmp_path: Path,
    bpe: ByteLevelTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoints", bpe)
    output = tmp_path / "m.gguf"
    command = [
        "export",
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(output),
        "--no-verify",
        "--quantize",
    ]
    module._ggml.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert main([*command, "q4_k_m"]) == 2
    said = capsys.readouterr().err
    assert 'needs ggml, and the package xllamacpp is not installed; pip install "atlas-llm[llama]"' in said
    assert said.count("\n") == 1
    assert not output.exists()
    assert main([*command, "q4_1"]) == 0
    monkeypatch.undo()
    module._ggml.cache_clear()

    class Without:
        def __init__(self, path: str) -> None:
            pass

    monkeypatch.setattr(ctypes, "CDLL", Without)
    if module.importlib.util.find_spec("xllamacpp"):
        with pytest.raises(AtlasError, match="lacks the function ggml_quantize_chunk"):
            module.check_available("q6_k")
    module._ggml.cache_clear()


def test_the_command_prints_types_and_writes_licence_and_modelfile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bpe = Tokenizer.train([corpus()], 400)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", bpe)
    output = tmp_path / "out" / "river.gguf"
    command = ["export", "--checkpoint", str(checkpoint), "--output", str(output), "--no-verify"]
    assert main([*command, "--quantize", "q4_1", "--license", "mit", "--modelfile"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(output), str(output.with_name("Modelfile"))]
    lines = dict(line.split(None, 1) for line in said.err.splitlines() if line.count(" "))
    assert lines["token_embd.weight"] == "q8_0"
    assert lines["blk.*.ffn_up.weight"] == "q4_1"
    reader = gguf.GGUFReader(output)
    fields, parameters = reader.fields, sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert fields["general.license"].contents() == "mit"
    assert fields["general.size_label"].contents() == f"{parameters / 1000:.1f}K"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    modelfile = output.with_name("Modelfile").read_text()
    assert modelfile.startswith("FROM ./river.gguf\n")
    assert "PARAMETER num_ctx 48\n" in modelfile
    output.with_name("Modelfile").write_text("my own notes")
    assert main([*command, "--modelfile"]) == 2
    assert "is not a Modelfile" in capsys.readouterr().err
    assert output.with_name("Modelfile").read_text() == "my own notes"
    assert main([*command, "--format", "hf", "--modelfile"]) == 2
    assert "--modelfile: is for GGUF" in capsys.readouterr().err
