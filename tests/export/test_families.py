"""Public families of models: from transformers to Atlas and back, and in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas.cli import main
from atlas.config.model import RopeScaling
from atlas.errors import ExportError
from atlas.export.gguf import read_gguf
from atlas.export.hf_format import names_of, state_out
from atlas.export.import_hf import import_hf
from atlas.inference.load import load_model
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.training.loss import compute_lm_loss
from tests.conftest import corpus
from tests.export.test_export import needs_llama_cpp
from tests.test_model import difference

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 48}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "phi3": ("Phi3", {"sliding_window": 100}),
}


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus()], 320)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def saved(family: str, tokenizer: Tokenizer, folder: Path) -> Any:
    """A random model of a family, whose every parameter matters, saved with a tokenizer."""
    import transformers

    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SHAPE | {"vocab_size": tokenizer.vocab_size} | more))
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 4 if parameter.dim() == 1 and parameter.mean() == 1 else noise / 7)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(
    tmp_path: Path, bpe: ByteLevelTokenizer, family: str
) -> None:
    theirs = saved(family, bpe, tmp_path / "hf")
    model, _ = import_hf(tmp_path / "hf")
    context = {"mistral-window": 48, "phi3": 100}.get(family, 128)
    assert model.config.max_seq_len == context
    tokens = torch.randint(320, (2, context), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=tokens, labels=tokens)
    logits = model(tokens)
    assert difference(logits, expected.logits) <= 1e-5
    compute_lm_loss(logits[:, :-1], tokens[:, 1:]).backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = state_out(gradients, model.config)
    named = dict(theirs.named_parameters())
    assert len(ours) == len(names_of(model.config))
    for name, gradient in ours.items():
        if "phi3" in family and name not in named:  # matrices that Phi-3 joins
            continue
        assert difference(gradient, named[name].grad) <= 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_to_transformers_bit_for_bit(
    tmp_path: Path, bpe: ByteLevelTokenizer, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = saved(family, bpe, tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), "--output-dir", str(tmp_path / "in")]) == 0
    limit = {"mistral-window": 48, "phi3": 100}.get(family)
    assert ("the model attends to windows" in capsys.readouterr().err) == (limit is not None)
    checkpoint = str(tmp_path / "in" / "atlas_best.pt")
    export = ["export", "--format", "hf", "--checkpoint", checkpoint, "--output", str(tmp_path / "out")]
    assert main([*export, "--quantize", "f32"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    context = load_model(checkpoint).config.model.max_seq_len
    tokens = torch.randint(320, (1, context), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if family == "phi3":  # one product of a joined matrix rounds in another way than three
            assert difference(again(tokens).logits, theirs(tokens).logits) <= 1e-5
        else:
            assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_step_of_fine_tuning_llama_cpp_says_the_same(
    tmp_path: Path, bpe: ByteLevelTokenizer, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(family, bpe, tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), "--output-dir", str(tmp_path / "in")]) == 0
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    imported = str(tmp_path / "in" / "atlas_best.pt")
    paths = ["--train-data", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "tuned")]
    assert main(["train", "--init-from", imported, *paths, "--max-steps", "1", "--batch-size", "2"]) == 0
    for source in (imported, str(tmp_path / "tuned" / "atlas_best.pt")):
        capfd.readouterr()
        file = tmp_path / "model.gguf"
        assert main(["export", "--checkpoint", source, "--output", str(file), "--quantize", "f32"]) == 0
        assert "proved" in capfd.readouterr().err
        read, _ = read_gguf(file)
        loaded = load_model(source)
        assert read.config.rope_scaling == loaded.config.model.rope_scaling
        assert all(
            torch.equal(tensor, loaded.model.state_dict()[name]) for name, tensor in read.state_dict().items()
        )


def test_the_known_scalings_are_read_from_files_of_others(tmp_path: Path) -> None:
    from atlas.config import ModelConfig
    from atlas.export.gguf import _scaling_with
    from atlas.model.rope import stretching

    config = ModelConfig(hidden_size=64, num_heads=1, position="rope", rope_theta=500000.0)
    for factor in (8, 32):
        scaling = RopeScaling(factor=factor)
        assert _scaling_with(stretching(64, 500000.0, scaling), config, {}) == scaling
    with pytest.raises(
        ExportError, match=r"rope_freqs\.weight stretches RoPE in a way that Atlas does not know"
    ):
        _scaling_with(torch.full((32,), 3.0), config, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_parameters of type yarn: Atlas supports",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_parameters of type linear: Atlas supports"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4}},
            "rope_parameters without low_freq_factor",
        ),
        (
            {"no_rope_layers": [1, 0, 1, 0, 1]},
            "no_rope_layers: Atlas imports only models with RoPE in all but",
        ),
        ({"no_rope_layers": [1]}, "no_rope_layers: Atlas imports only models with RoPE in all but"),
        ({"no_rope_layer_interval": "4"}, "no_rope_layer_interval 4: Atlas imports only models with 4"),
        ({"num_hidden_layers": 10**10}, "num_layers"),
        ({"rope_parameters": [1]}, "config.json: holds a value of a wrong kind"),
        ({"model_type": []}, "model_type []: Atlas imports"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_parameters of type linear",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path,
    bpe: ByteLevelTokenizer,
    change: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved("smollm3", bpe, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    stated = json.loads(file.read_text(encoding="utf-8"))
    if "rope_scaling" in change or "num_hidden_layers" in change:
        del stated["no_rope_layers"]
    if "rope_scaling" in change:
        del stated["rope_parameters"]
    file.write_text(json.dumps(stated | change), encoding="utf-8")
    assert main(["import", str(tmp_path / "hf"), "--output-dir", str(tmp_path / "in")]) == 2
    assert said in capsys.readouterr().err


def test_sampling_settings_go_through(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    saved("qwen2", bpe, tmp_path / "hf")
    stated = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    strange = {"temperature": 0.7, "max_length": 7, "top_k": "many", "cache": {"a": 1}, "top_p": float("nan")}
    export = ["export", "--format", "hf", "--checkpoint"]
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    for number, (content, kept) in enumerate([(stated, stated), (strange, {"temperature": 0.7})]):
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
        folder = tmp_path / f"in{number}"
        assert main(["import", str(tmp_path / "hf"), "--output-dir", str(folder)]) == 0
        paths = ["--train-data", str(tmp_path / "text.txt"), "--output-dir", str(folder / "tuned")]
        train = ["train", "--init-from", str(folder / "atlas_best.pt"), *paths, "--batch-size", "2"]
        assert main([*train, "--max-steps", "1"]) == 0
        assert main([*export, str(folder / "tuned/atlas_best.pt"), "--output", str(folder / "out")]) == 0
        written = json.loads((folder / "out" / "generation_config.json").read_text(encoding="utf-8"))
        assert {key: written[key] for key in (*stated, "max_length", "cache") if key in written} == kept
