"""Low-rank updates: against PEFT, merged and not, and what is trainable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atlas.cli import main
from atlas.config import LoraConfig
from atlas.config.loader import resolve
from atlas.export.huggingface import export_hf
from atlas.export.peft import export_adapter
from atlas.export.save_imported import save_imported
from atlas.inference.load import load_model
from atlas.model import AtlasLM, add_lora, has_lora, merged
from atlas.model.cost import lora_parameters
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.training.checkpoint.load import load_checkpoint
from tests.conftest import corpus
from tests.export.test_export import MODERN, sharp_model

SHAPES = {"gpt2": {"max_seq_len": 64}, "llama-gqa": MODERN["llama-gqa"], "qwen3": MODERN["qwen3"]}


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus()], 300)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def with_updates(model: AtlasLM, lora: LoraConfig) -> AtlasLM:
    """Updates as after long training."""
    add_lora(model, lora, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter += torch.randn_like(parameter) / 5
    return model


@pytest.mark.parametrize(
    "targets",
    [("qkv", "output", "up", "down"), ("output",), ("qkv", "up"), ("qkv", "embedding", "head"), ("head",)],
    ids=",".join,
)
@pytest.mark.parametrize("name", SHAPES)
def test_peft_and_merged_weights_compute_what_the_model_computes(
    tmp_path: Path, bpe: ByteLevelTokenizer, name: str, targets: tuple
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(rank=3, alpha=12, targets=targets)
    model = sharp_model(bpe, **SHAPES[name])
    tokens = torch.randint(bpe.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    plain = model(tokens)
    export_hf(model, bpe, tmp_path / "base")
    with_updates(model, lora)
    expected = model(tokens)
    largest = float(expected.detach().abs().max())
    assert float((expected - plain).detach().abs().max()) > 0.1 * largest

    alone = AtlasLM(model.config).eval()
    alone.load_state_dict(merged(model.state_dict(), lora))
    assert float((alone(tokens) - expected).detach().abs().max()) <= 1e-5 * largest

    export_adapter(model.state_dict(), model.config, lora, bpe, tmp_path / "adapter", base="base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert float((theirs(tokens).logits - expected).detach().abs().max()) <= 1e-5 * largest


def test_updates_start_at_the_base_model_and_only_they_are_trained(bpe: ByteLevelTokenizer) -> None:
    model = sharp_model(bpe)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    add_lora(model, LoraConfig(rank=4), seed=1)
    assert torch.equal(model(tokens), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name in model.state_dict() if name.endswith(("lora_a", "lora_b"))}
    config = resolve({"model": model.config.model_dump(), "lora": {"rank": 4}})
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert lora_parameters(config) == counted


def train(tmp_path: Path, *options: str) -> int:
    command = ["train", "--train-data", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "tuned")]
    settings = [
        "training.warmup_steps=0",
        "lora.rank=4",
        "training.learning_rate=0.01",
        "checkpoint.save_interval=2",
    ]
    return main([*command, "--batch-size", "2", *(w for s in settings for w in ("--set", s)), *options])


@pytest.mark.parametrize("targets", ["[up,embedding]", "[head]"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_the_tables_get_updates_that_are_trained(
    tmp_path: Path, bpe: ByteLevelTokenizer, optimizer: str, targets: str
) -> None:
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    base = save_imported(sharp_model(bpe), bpe, tmp_path / "base", source="a test")
    start = [
        "--init-from",
        str(base),
        "--set",
        f"training.optimizer={optimizer}",
        "--set",
        f"lora.targets={targets}",
    ]
    assert train(tmp_path, *start, "--max-steps", "4") == 0
    weights = load_checkpoint(tmp_path / "tuned" / "atlas_step_4.pt")["model_state_dict"]
    assert weights["token_embedding.lora_b"].any()
    assert train(tmp_path, "--resume", str(tmp_path / "tuned" / "atlas_step_2.pt"), "--max-steps", "6") == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_updates_resumes_and_its_model_is_used_as_any_other(
    tmp_path: Path, bpe: ByteLevelTokenizer, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    base = save_imported(sharp_model(bpe), bpe, tmp_path / "base", source="a test")
    start = ["--init-from", str(base), "--set", f"training.optimizer={optimizer}"]
    assert train(tmp_path, *start, "--max-steps", "6") == 0
    assert "trainable parameters; the model's own parameters are frozen" in capsys.readouterr().err
    whole = load_checkpoint(tmp_path / "tuned" / "atlas_step_6.pt")["model_state_dict"]
    rest = load_checkpoint(base)["model_state_dict"]
    assert all(torch.equal(whole[name], tensor) for name, tensor in rest.items())
    assert any(whole[name].any() for name in whole if name.endswith("lora_b"))

    again = [
        "train",
        "--resume",
        str(tmp_path / "tuned" / "atlas_step_2.pt"),
        "--output-dir",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    resumed = load_checkpoint(tmp_path / "again" / "atlas_step_6.pt")["model_state_dict"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    loaded = load_model(tmp_path / "tuned" / "atlas_best.pt")
    assert not has_lora(loaded.model)
    assert not torch.equal(loaded.model.blocks[0].mlp.up.weight, rest["blocks.0.mlp.up.weight"])
    best = ["export", "--checkpoint", str(tmp_path / "tuned" / "atlas_best.pt"), "--output"]
    assert main([*best, str(tmp_path / "m.gguf"), "--no-verify"]) == 0
    assert main([*best, str(tmp_path / "adapter"), "--format", "peft"]) == 0
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_what_cannot_be_is_one_line(
    tmp_path: Path, bpe: ByteLevelTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    assert train(tmp_path, "--max-steps", "2") == 2
    assert "needs a trained model: name its checkpoint with --init-from" in capsys.readouterr().err
    base = save_imported(sharp_model(bpe), bpe, tmp_path / "base", source="a test")
    assert train(tmp_path, "--init-from", str(base), "--max-steps", "2") == 0
    again = ["train", "--resume", str(tmp_path / "tuned" / "atlas_step_2.pt"), "--max-steps", "4"]
    capsys.readouterr()
    assert main([*again, "--set", "lora.rank=5"]) == 2
    assert "was trained with lora.rank 4" in capsys.readouterr().err
    command = ["export", "--checkpoint", str(base), "--format", "peft", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "all weights of this model were trained" in capsys.readouterr().err
    assert main([*command, "--quantize", "f16"]) == 2
    assert "takes no --quantize" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
