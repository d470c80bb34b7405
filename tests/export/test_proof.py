"""The proof of a GGUF file fails for each fault of a writer, at each type, and holds for correct files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from atlas.config import ModelConfig
from atlas.export import gguf as module
from atlas.export.architectures import exportable_state, for_llama_cpp, from_llama_cpp, joined
from atlas.export.gguf import export_gguf
from atlas.export.quantize import QUANTIZATIONS
from atlas.export.verify import verify_gguf
from atlas.model import AtlasLM
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from tests.conftest import corpus
from tests.export.test_export import MODERN, needs_llama_cpp, sharp_model

State = dict[str, Tensor]
IN_DEFAULT_SUITE = ("f32", "q8_0", "q4_k_m")


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus()], 400)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def model_of(bpe: ByteLevelTokenizer) -> AtlasLM:
    """256 wide, so that K-quants store blocks of 256."""
    return sharp_model(bpe, **(MODERN["llama-gqa"] | {"hidden_size": 256, "num_layers": 2}))


# Faults of the writer that the reader shares: only llama.cpp shows them.


def rows_in_another_order(state: State, config: ModelConfig) -> State:
    """llama.cpp's RoPE rotates neighbouring rows; these stay in Atlas's order, in the last layer alone."""
    plain = exportable_state(state, config)
    last = f"blocks.{config.num_layers - 1}.attention."
    return {
        name: plain[name] if name in (f"{last}q.weight", f"{last}k.weight") else tensor
        for name, tensor in for_llama_cpp(state, config).items()
    }


def rows_back(state: State, config: ModelConfig) -> State:
    last = f"blocks.{config.num_layers - 1}.attention.qkv.weight"
    return from_llama_cpp(state, config) | {last: joined(state, config)[last]}


def transposed(state: State, config: ModelConfig) -> State:
    state = for_llama_cpp(state, config)
    name = "blocks.1.attention.output.weight"
    return state | {name: state[name].T.contiguous()}


def transposed_back(state: State, config: ModelConfig) -> State:
    name = "blocks.1.attention.output.weight"
    return from_llama_cpp(state | {name: state[name].T.contiguous()}, config)


SHARED = {"rows": (rows_in_another_order, rows_back), "transposed": (transposed, transposed_back)}


# Faults of the bytes.


def swap_scales(data: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> None:
    """Exchange the scales of two blocks. They are the first two bytes of a block, or its last two (q6_k). Without
    blocks, exchange two weights."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rows = data.reshape(-1).view(np.uint8).reshape(-1, size)
    place = slice(-2, None) if kind is gguf.GGMLQuantizationType.Q6_K else slice(0, 2)
    first = next(n for n in range(1, len(rows)) if (rows[n, place] != rows[0, place]).any())
    rows[[0, first], place] = rows[[first, 0], place]


def shift_blocks(data: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> None:
    """Begin the blocks of a tensor one block too late."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    flat = data.reshape(-1).view(np.uint8)
    flat[:] = np.roll(flat, size)


BYTES = {"scales": swap_scales, "shifted": shift_blocks}


@needs_llama_cpp
@pytest.mark.parametrize("fault", [*SHARED, *BYTES])
@pytest.mark.parametrize(
    "quantize",
    [pytest.param(q, marks=[] if q in IN_DEFAULT_SUITE else pytest.mark.slow) for q in QUANTIZATIONS],
)
def test_each_fault_is_found_at_each_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: ByteLevelTokenizer, quantize: Any, fault: str
) -> None:
    model, file = model_of(bpe), tmp_path / "m.gguf"
    if fault in SHARED:
        writes, reads = SHARED[fault]
        monkeypatch.setattr(module, "for_llama_cpp", writes)
        monkeypatch.setattr(module, "from_llama_cpp", reads)
    export_gguf(model, bpe, file, quantize=quantize)
    if fault in BYTES:
        damage(file, BYTES[fault])
    proof = verify_gguf(file, model, bpe, quantize=quantize, max_tokens=25)
    assert not proof.holds, str(proof)
    found = {name for name, agrees, _ in proof.checks if not agrees}
    assert ("file" in found) == (fault in BYTES), str(proof)


def damage(file: Path, change: Callable[[np.ndarray[Any, Any], gguf.GGMLQuantizationType], None]) -> None:
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(each for each in reader.tensors if each.name == "blk.1.ffn_down.weight")
    change(tensor.data, tensor.tensor_type)
    reader.data.flush()


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("quantize", ["f16", "q8_0", "q6_k", "q4_k_m", "q4_0"])
def test_correct_files_of_large_random_models_are_not_refused(
    tmp_path: Path, seed: int, quantize: Any
) -> None:
    """About 60 M parameters, with predictions as sharp as those of a trained model, in shapes of public models."""
    shapes = [
        {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "mlp_size": 1536, "num_layers": 12},
        {"hidden_size": 768, "num_heads": 12, "mlp_size": 2048, "num_layers": 4, "tie_embeddings": False},
        {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "num_layers": 10},
        {"hidden_size": 640, "num_heads": 10, "mlp_size": 1728, "num_layers": 8, "qk_norm": True},
        {"hidden_size": 480, "num_heads": 8, "mlp_size": 1280, "num_layers": 16},
    ]
    tokenizer = Tokenizer.gpt2()
    torch.manual_seed(seed)
    config = ModelConfig(**({**MODERN["llama"], "vocab_size": 50257} | shapes[seed]))
    model = AtlasLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() == 2:
                parameter.normal_(std=1.2 / parameter.shape[1] ** 0.5)
        model.token_embedding.weight[config.vocabulary :] = 0
    export_gguf(model, tokenizer, tmp_path / "m.gguf", quantize=quantize)
    proof = verify_gguf(tmp_path / "m.gguf", model, tokenizer, quantize=quantize, max_tokens=50)
    assert proof.holds, str(proof)
