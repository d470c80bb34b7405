"""What the worked examples of docs/CONTRIBUTING.md must do.

`test_contributing.py` runs `python -m tests.worked_examples NAME` in a copy of the tree to which a diff was applied.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas.errors import ExportError
from atlas.export.gguf import export_gguf, file_tensors
from atlas.inference.generate import generate
from atlas.inference.load import load_model
from atlas.inference.sampling import Sampling
from atlas.model import AtlasLM, KVCache, build_model
from atlas.tokenizer import Tokenizer
from tests.runs import layer, trained

TEXT = "The river runs past the mill, and the mill turns. " * 60


def check(*, is_exportable: bool, **settings: Any) -> AtlasLM:
    """Train, resume, load, generate and export a tiny model; return it as it was loaded."""
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save("tokenizer.json")
    explicit = layer(
        Path("run"),
        Path("text.txt"),
        data__tokenizer="tokenizer.json",
        training__max_steps=10,
        checkpoint__save_interval=5,
        model__num_heads=4,
        **settings,
    )
    run, result = trained(explicit)
    weights = {name: tensor.clone() for name, tensor in run.learner.model.state_dict().items()}
    assert result.loss is not None
    assert result.loss < 0.9 * math.log(300)  # where training begins
    resumed, _ = trained(explicit, resume="run/atlas_step_5.pt")
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in resumed.learner.model.state_dict().items()
    )

    model = load_model("run/atlas_step_10.pt").model
    check_cache(model)
    assert (model.config.train_only is None) == is_exportable
    if is_exportable:
        export_gguf(model, tokenizer, "model.gguf", quantize="f32")
    else:
        with pytest.raises(ExportError, match="for Atlas only"):
            export_gguf(model, tokenizer, "model.gguf")
    return model


def check_cache(model: AtlasLM) -> None:
    """Logits and greedy text with a cache are those without one, in ragged batches and past the context too."""
    tokens = torch.arange(14)[None] % model.config.vocabulary
    cache = KVCache(model.config, 1)
    parts = [model(tokens[:, :5], cache), *(model(tokens[:, t : t + 1], cache) for t in range(5, 14))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-5)
    prompts, greedy = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], Sampling(temperature=0)
    with_cache, without = (
        list(generate(model, prompts, greedy, max_tokens=24, use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert with_cache == without


def alibi() -> None:
    """Attention weights equal a formula written with loops; documents stay apart; the context has no end."""
    for kv_heads in (4, 2):
        model = check(is_exportable=False, model__position="alibi", model__num_kv_heads=kv_heads)
        attention = model.blocks[0].attention
        tokens = torch.arange(12)[None] * 3
        x, context = model.embed(tokens)
        normed = model.blocks[0].attention_norm(x)
        expected = weights_by_loops(attention.qkv(normed)[0], kv_heads)
        torch.testing.assert_close(attention.weights(normed, context)[0], expected, rtol=0, atol=1e-5)

        documents = torch.tensor([[0] * 5 + [1] * 7])
        apart = [model(tokens[:, :5]), model(tokens[:, 5:])]
        torch.testing.assert_close(model(tokens, documents=documents), torch.cat(apart, 1), rtol=0, atol=1e-5)

        longer = build_model(model.config.model_copy(update={"max_seq_len": 64})).eval()
        longer.load_state_dict(model.state_dict())
        tokens = torch.arange(60)[None] % 300
        torch.testing.assert_close(longer(tokens)[:, :16], model(tokens[:, :16]), rtol=0, atol=1e-5)
        shutil.rmtree("run")


def weights_by_loops(qkv: Tensor, kv_heads: int, *, heads: int = 4, size: int = 4) -> Tensor:
    """(T, (H + 2K) · D) → (H, T, T), one number after the other."""
    num_tokens = len(qkv)
    weights = torch.zeros(heads, num_tokens, num_tokens)
    for head in range(heads):
        key_head = heads + head * kv_heads // heads
        for query in range(num_tokens):
            scores = []
            for key in range(query + 1):
                q = qkv[query, head * size : (head + 1) * size]
                k = qkv[key, key_head * size : (key_head + 1) * size]
                slope = 0.25 ** (head + 1)  # of four heads: 1/4, 1/16, 1/64, 1/256
                scores.append(float(q @ k) / math.sqrt(size) - slope * (query - key))
            total = sum(map(math.exp, scores))
            for key, score in enumerate(scores):
                weights[head, query, key] = math.exp(score) / total
    return weights


def nadam() -> None:
    """The optimizer changes no model: it can be exported."""
    model = check(is_exportable=True, training__optimizer="nadam")
    assert file_tensors(model)


def gemma_norm() -> None:
    """The norm equals its formula, at a gain that was trained."""
    model = check(is_exportable=False, model__norm="gemma")
    norm, x = model.final_norm, torch.randn(3, 16)
    assert norm.weight.abs().max() > 0
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(norm(x), expected)


if __name__ == "__main__":
    {"alibi": alibi, "nadam": nadam, "gemma_norm": gemma_norm}[sys.argv[1]]()
