"""Documents in one sequence: none attends to another, whichever kernel computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas.config import AtlasConfig, DataConfig, ModelConfig, TrainingConfig
from atlas.data.sequences.dataset import documents_of
from atlas.model import AtlasLM, KVCache, build_model
from atlas.model.documents import dense_mask, document_positions, sparse_mask, takes_flex_attention
from atlas.training.memory.estimate import estimate_training_memory
from atlas.training.summary import _log_dense_attention
from tests.runs import assert_same_run, layer, stopped_and_resumed, trained

CONFIG = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=50, max_seq_len=24)
lengths_of_a_row = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(lambda lengths: lengths[:8])


def documents_from(lengths: list[int], total: int = 24) -> Tensor:
    """(1, total): as many documents of these lengths as fit, the last one filling up."""
    row = [number for number, length in enumerate([*lengths, total]) for _ in range(length)]
    return torch.tensor([row[:total]])


def sharp() -> AtlasLM:
    model = build_model(CONFIG, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@settings(deadline=None, max_examples=25)
@given(lengths_of_a_row)
def test_a_document_is_computed_as_if_it_were_alone(lengths: list[int]) -> None:
    model, documents = sharp(), documents_from(lengths)
    tokens = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    together = model(tokens, documents=documents)
    for number in documents.unique():
        alone = model(tokens[documents == number][None])
        torch.testing.assert_close(together[documents == number][None], alone, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_sum_of_those_of_each_document_alone() -> None:
    model, documents = sharp(), documents_from([5, 9, 10])
    tokens = torch.randint(0, 50, (1, 24))
    weights = torch.randn(1, 24, 50)
    (model(tokens, documents=documents) * weights).sum().backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for number in documents.unique():
        own = documents == number
        (model(tokens[own][None]) * weights[own][None]).sum().backward()
    for parameter, gradient in zip(model.parameters(), together, strict=True):
        largest = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * max(1, largest))


def test_a_token_does_not_change_when_the_document_before_it_does() -> None:
    model, documents = sharp(), documents_from([10, 14])
    tokens = torch.randint(0, 50, (1, 24))
    other = tokens.clone()
    other[documents == 0] = (other[documents == 0] + 7) % 50
    before, after = (model(row, documents=documents)[documents == 1] for row in (tokens, other))
    assert torch.equal(before, after)
    assert not torch.allclose(model(tokens)[documents == 1], model(other)[documents == 1])


def test_one_document_is_what_the_model_computes_without_documents() -> None:
    model, tokens = sharp(), torch.randint(0, 50, (2, 24))
    one = model(tokens, documents=torch.zeros(2, 24, dtype=torch.long))
    torch.testing.assert_close(one, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # on a CPU it has no backward pass
def test_flex_attention_computes_what_the_dense_mask_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = sharp(), torch.randint(0, 50, (2, 24))
    documents = torch.cat([documents_from([3, 8, 13]), documents_from([24])])
    dense = model(tokens, documents=documents)
    monkeypatch.setattr("atlas.model.documents.has_flex_attention", lambda device: True)
    torch.testing.assert_close(model(tokens, documents=documents), dense, rtol=1e-5, atol=1e-5)
    block_mask = sparse_mask(documents)
    for b, query, key in [(0, 4, 3), (0, 4, 2), (0, 3, 4), (1, 23, 0), (0, 23, 11), (0, 23, 10)]:
        allowed = block_mask.mask_mod(*(torch.tensor(index) for index in (b, 0, query, key)))
        assert bool(allowed) == bool(dense_mask(documents)[b, 0, query, key])


def test_flex_attention_is_for_cuda_without_dropout_and_for_heads_wide_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Triton
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert takes_flex_attention(cuda, head_size=16, dropout=0.0)
    assert not takes_flex_attention(cuda, head_size=15, dropout=0.0)
    assert not takes_flex_attention(cuda, head_size=64, dropout=0.1)
    assert not takes_flex_attention(cpu, head_size=64, dropout=0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not takes_flex_attention(cuda, head_size=64, dropout=0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_heads": 2}, None),
        ({"num_heads": 4}, "needs a head size of at least 16, and this model has 8; fewer model.num_heads"),
        ({"num_heads": 2, "dropout": 0.1}, "does not support dropout; model.dropout 0 is faster"),
    ],
)
def test_the_start_says_why_attention_is_dense_on_cuda(settings: dict[str, Any], says: str | None) -> None:
    said: list[str] = []
    config = AtlasConfig(model=ModelConfig(hidden_size=32, **settings), data=DataConfig(document_mask=True))
    _log_dense_attention(config, said.append)
    assert len(said) == (says is not None)
    assert all(says in line for line in said)


def test_the_estimate_on_cuda_counts_a_dense_mask_for_narrow_heads() -> None:
    wide, narrow = (
        estimate_training_memory(
            AtlasConfig(
                model=ModelConfig(hidden_size=32, num_heads=heads, vocab_size=64, max_seq_len=128),
                training=TrainingConfig(batch_size=2, precision="fp32"),
                data=DataConfig(document_mask=True),
            ),
            device="cuda",
        )
        for heads in (2, 4)
    )
    mask = 5 * 2 * 128 * 128
    logarithms = 12 * 2 * 2 * 128 * 4  # of two heads more in twelve layers
    assert narrow.activations - wide.activations == mask + logarithms


@given(lengths_of_a_row)
def test_positions_count_from_each_documents_beginning(lengths: list[int]) -> None:
    documents = documents_from(lengths)
    row = documents[0].tolist()
    assert document_positions(documents)[0].tolist() == [
        t - row.index(number) for t, number in enumerate(row)
    ]


def test_the_token_after_an_end_of_text_begins_a_document() -> None:
    assert documents_of(torch.tensor([5, 0, 7, 7, 0, 0, 1]), 0).tolist() == [0, 0, 1, 1, 1, 2, 3]


def test_all_layers_share_one_mask_in_half_precision_too() -> None:
    """Autocast would convert an fp32 mask in each layer, and each layer would keep its copy."""
    model, numbers = sharp(), torch.zeros(1, 24, dtype=torch.long)
    masks: set[int] = set()

    def save(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (24, 24):
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model.hidden_states(numbers, documents=numbers)
    assert len(masks) == 1


def test_gradient_checkpointing_keeps_the_mask() -> None:
    model, documents = sharp().train(), documents_from([5, 9, 10])
    tokens = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    plain = model(tokens, documents=documents)
    model.gradient_checkpointing = True
    assert torch.equal(model(tokens, documents=documents), plain)
    assert not torch.allclose(model(tokens), plain)


def test_a_cache_and_documents_are_refused_together() -> None:
    with pytest.raises(ValueError, match="cache"):
        sharp()(torch.zeros(1, 2, dtype=torch.long), KVCache(CONFIG, 1), torch.zeros(1, 2, dtype=torch.long))


def corpus(folder: Path) -> Path:
    """Forty short documents of different lengths."""
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        words = " ".join(str(number * place) for place in range(1, 4 + number % 11))
        (texts / f"{number:02}.txt").write_text(words, encoding="utf-8")
    return texts


def test_a_masked_run_resumes_bit_for_bit_and_differs_from_an_unmasked_one(tmp_path: Path) -> None:
    text = corpus(tmp_path)
    settings_ = {"data__document_mask": True, "training__micro_batch_size": 3, "training__eval_interval": 3}
    trained(layer(tmp_path / "whole", text, **settings_))
    stopped_and_resumed(layer(tmp_path / "parts", text, **settings_))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", steps=6)
    _, plain = trained(layer(tmp_path / "plain", text))
    _, masked = trained(layer(tmp_path / "masked", text, data__document_mask=True))
    assert plain.loss != masked.loss


def test_the_estimate_counts_the_mask_that_is_kept_for_the_backward_pass() -> None:
    config = ModelConfig(hidden_size=32, num_layers=3, num_heads=2, vocab_size=64, max_seq_len=128)
    model = build_model(config, seed=0).train()
    tokens = torch.zeros(2, 128, dtype=torch.long)

    def kept(documents: Tensor | None) -> int:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            logits = model(tokens, documents=documents)
        assert logits.requires_grad
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    measured = kept(torch.zeros(2, 128, dtype=torch.long)) - kept(None)
    plain, masked = (
        estimate_training_memory(
            AtlasConfig(
                model=config, training=TrainingConfig(batch_size=2), data=DataConfig(document_mask=mask)
            ),
            device="cpu",
        )
        for mask in (False, True)
    )
    assert measured <= masked.activations - plain.activations <= 1.3 * measured
