"""People who come from Atlas 1.x: their checkpoints, config keys and flags."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.cli import main
from atlas.cli.old_flags import OLD_FLAGS
from atlas.config.loader import fields, parse_overrides, read_yaml
from atlas.config.renamed import FIRST_ATLAS, REMOVED, RENAMED
from atlas.errors import AtlasError
from atlas.inference.load import load_model
from atlas.tokenizer import Tokenizer
from tests.cli.test_bad_input import Bomb
from tests.conftest import corpus
from tests.test_docs import flags_of, tables_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/MIGRATING.md"

# Config keys

OLD_KEYS = {
    "model": "num_layers hidden_size num_heads mlp_ratio vocab_size max_seq_len dropout attention_dropout use_bias "
    "norm_eps tie_weights activation gradient_checkpointing",
    "training": "learning_rate weight_decay beta1 beta2 grad_clip max_grad_norm optimizer_type momentum warmup_steps "
    "max_steps lr_schedule scheduler_type min_lr_ratio batch_size gradient_accumulation_steps gradient_checkpointing "
    "use_amp eval_interval eval_steps keep_checkpoints",
    "data": "train_data_path val_data_path tokenizer_path num_workers prefetch_factor pin_memory max_seq_len "
    "sequence_length",
    "logging": "checkpoint_dir log_dir log_interval checkpoint_interval keep_last_n_checkpoints save_optimizer_state "
    "log_gradients log_model_structure",
    "inference": "max_new_tokens temperature top_k top_p do_sample eos_token_id pad_token_id",
    "tokenizer": "name encoding",
}
"""Every key of the configs of Atlas 1.2.4, in its files and its classes."""


@pytest.mark.parametrize(
    "key",
    ["seed", "device", *(f"{section}.{key}" for section in OLD_KEYS for key in OLD_KEYS[section].split())],
)
def test_each_old_key_is_a_setting_or_gets_a_true_hint(key: str) -> None:
    try:
        parse_overrides([f"{key}=1"])
    except AtlasError as error:
        message = str(error)
        named = re.findall(r"(?:it is|write it as) ([\w.]+)", message)
        assert named or re.search(r"remove it: \w.{10}", message), message
        assert set(named) <= fields().keys(), message
    else:
        assert key in fields() or key == "training.keep_checkpoints"


def test_every_renamed_key_names_a_setting() -> None:
    assert set(RENAMED.values()) <= fields().keys()
    assert not RENAMED.keys() & {key.rsplit(".", 1)[-1] for key in fields()}
    for reason in REMOVED.values():
        for flag in re.findall(r"--[a-z-]+", reason):
            assert flag in flags_of("generate")
        for setting in re.findall(r"[a-z]+\.\w+", reason):
            assert setting in fields() or setting in ("training.log", "metrics.jsonl")


def test_all_unknown_keys_of_a_file_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "old.yaml"
    config.write_text(
        "model: {activation: gelu, mlp_ratio: 4.0}\ntraining: {max_grad_norm: 1.0, use_amp: true}\n"
        "data: {pin_memory: true}\nlogging: {log_interval: 5}\ninference: {top_k: 5}\nzebra: 1\nmodel2:\n",
        encoding="utf-8",
    )
    assert main(["plan", "--config", str(config)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.removeprefix(f"error: {config}: ").rstrip().split("; ") == [
        "unknown setting model.activation: it is model.mlp here (gelu_exact computes what gelu computed in Atlas 1.x)",
        "unknown setting model.mlp_ratio: it is model.mlp_size here (hidden_size × mlp_ratio, by default "
        "4 × hidden_size)",
        "unknown setting training.max_grad_norm: it is training.grad_clip here",
        "unknown setting training.use_amp: it is training.precision here (auto, fp32, bf16, bf16-true or fp16)",
        "unknown setting data.pin_memory: remove it: Atlas pins memory by itself on a GPU",
        "logging.log_interval is not a setting here",
        "write it as training.log_interval",
        "unknown setting inference: remove it: these are options of atlas generate, such as --max-tokens and "
        "--temperature",
        "unknown setting zebra: docs/CONFIG.md lists every setting",
        "unknown setting model2: did you mean model?",
    ]


def test_a_file_of_thousands_of_unknown_keys_is_still_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("".join(f"key{n}: {n}\n" for n in range(9000)), encoding="utf-8")
    with pytest.raises(AtlasError, match=r"key39: .*; and 8,960 more unknown settings$") as caught:
        read_yaml(tmp_path / "many.yaml")
    assert len(str(caught.value)) < 4000


def test_a_wrong_section_and_an_unknown_key_are_reported_together() -> None:
    with pytest.raises(AtlasError) as caught:
        parse_overrides(["model=12", "training.lr=1"])
    assert str(caught.value) == (
        "--set: model: is a section with keys of its own, not 12; "
        "unknown setting training.lr: it is training.learning_rate here"
    )


# Options

OLD_OPTIONS = {
    "train": "--config --train-data --val-data --output-dir --max-steps --eval-interval --save-interval "
    "--log-interval --resume --no-resume --device --learning-rate --batch-size --override",
    "generate": "--checkpoint --prompt --prompts-file --interactive --max-new-tokens --temperature --top-k --top-p "
    "--do-sample --device --tokenizer --output-file --show-prompt --separator",
    "prepare": "--input --output --list",
    "export": "--checkpoint --output --quantization --tokenizer",
    "plan": "--config --train-data --val-data --num-epochs --benchmark-steps --warmup-steps --save-interval "
    "--eval-interval --device --output",
}
"""Every option of the scripts of Atlas 1.2.4, by the command that does their work now."""


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in OLD_OPTIONS for option in OLD_OPTIONS[command].split()],
)
def test_each_old_option_exists_or_gets_a_true_hint(
    capsys: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    if option in flags_of(command):
        assert option not in OLD_FLAGS.get(command, {})
        return
    for written in (option, f"{option}=5"):
        assert main([command, written]) == 2
        message = capsys.readouterr().err
        assert (
            message
            == f"error: no such option: {option}; {OLD_FLAGS[command][option]}; see atlas {command} --help\n"
        )


@pytest.mark.parametrize("command", OLD_FLAGS)
def test_hints_of_options_name_what_exists(command: str) -> None:
    for hint in OLD_FLAGS[command].values():
        assert hint.startswith(("write --", "leave it out: "))
        assert set(re.findall(r"--[a-z-]+", hint)) <= flags_of(command)
        assert set(re.findall(r"--set ([a-z_.]+)=", hint)) <= fields().keys()


def test_a_list_with_commas_is_answered_with_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.txt", "my b.txt")):
        Path(name).write_text(corpus()[number:], encoding="utf-8")
    assert main(["train", "--config", "nano", "--train-data", "a.txt,my b.txt"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: a.txt,my b.txt: is a list, but Atlas expects one path; name a folder")
    remedy = re.search(r"atlas (prepare .*)$", message.strip())
    assert remedy
    assert main(shlex.split(remedy[1].replace("FOLDER", "joined"))) == 0
    assert main(["train", "--train-data", "a.txt,missing.txt"]) == 2
    assert "a.txt,missing.txt: no such file or folder" in capsys.readouterr().err


# The page


def test_the_page_has_a_row_for_each_old_key_and_option() -> None:
    rows = [" | ".join(row) for table in tables_of(PAGE) for row in table]
    for old, new in FIRST_ATLAS.items():
        assert any(f"`{old}`" in row and f"`{new}" in row for row in rows), old
    for key in REMOVED:
        assert any(f"`{key.rsplit('.', 1)[-1]}`" in row or key in row.split(" | ")[0] for row in rows), key
    scripts = {"generate": "infer.py", "export": "export_gguf.py", "plan": "estimate_training_time.py"}
    for command in OLD_FLAGS.keys() - {"pipeline"}:
        for flag in OLD_FLAGS[command].keys() - ({"--override"} if command == "plan" else set()):
            assert any(f"`{scripts.get(command, 'train.py')} {flag}" in row for row in rows), flag


# Checkpoints

HEADS, CONTEXT = 4, 24


class OldModel(nn.ModuleDict):
    """The parameters of an Atlas 1.x model, under its names."""

    def __init__(self, *, vocabulary: int, bias: bool, tied: bool, ratio: float) -> None:
        C, M = 32, int(32 * ratio)
        blocks = [
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(C),
                    "ln2": nn.LayerNorm(C),
                    "attn": nn.ModuleDict(
                        {"qkv_proj": nn.Linear(C, 3 * C, bias), "out_proj": nn.Linear(C, C, bias)}
                    ),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(C, M, bias), "fc2": nn.Linear(M, C, bias)}),
                }
            )
            for _ in range(2)
        ]
        embeddings = {
            "token_embedding": nn.ModuleDict({"embedding": nn.Embedding(vocabulary, C)}),
            "positional_embedding": nn.ModuleDict({"embedding": nn.Embedding(CONTEXT, C)}),
        }
        head = nn.Linear(C, vocabulary, bias=False)
        if tied:
            head.weight = embeddings["token_embedding"]["embedding"].weight
        super().__init__(
            {
                "embeddings": nn.ModuleDict(embeddings),
                "blocks": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(C),
                "lm_head": head,
            }
        )


def old_logits(weights: dict[str, Tensor], tokens: Tensor, *, eps: float = 1e-5) -> Tensor:
    """(B, T) ids → (B, T, V), as Atlas 1.x computed them: pre-norm blocks, explicit masked softmax, the exact GELU."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    (B, T), C = tokens.shape, 32
    x = weights["embeddings.token_embedding.embedding.weight"][tokens]
    x = x + weights["embeddings.positional_embedding.embedding.weight"][:T]
    for block in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{block}.ln1"), f"{block}.attn.qkv_proj").view(B, T, 3, HEADS, C // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(C // HEADS)
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        read = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        x = x + linear(read.transpose(1, 2).reshape(B, T, C), f"{block}.attn.out_proj")
        inside = linear(norm(x, f"{block}.ln2"), f"{block}.mlp.fc1")
        inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
        x = x + linear(inside, f"{block}.mlp.fc2")
    return linear(norm(x, "ln_f"), "lm_head")


def write_old(
    path: Path, *, vocabulary: int = 50261, bias: bool = True, tied: bool = True, ratio: float = 4.0
) -> dict[str, Any]:
    """A checkpoint as Atlas 1.2.4 saves one, with clear favourites among its logits, and its JSON file."""
    torch.manual_seed(7)
    model = OldModel(vocabulary=vocabulary, bias=bias, tied=tied, ratio=ratio)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = re.search(r"ln\w+\.weight", name)
            parameter.copy_((1 if is_gain else 0) + torch.randn(parameter.shape) / 4)
    optimizer = torch.optim.AdamW(
        [{"params": [*model.parameters()], "weight_decay": 0.01}], lr=3e-4, betas=(0.9, 0.95)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model["blocks"][0]["mlp"]["fc1"].weight.sum().backward()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    scheduler.step()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(saved[name])
    facts = {
        "step": 3000,
        "epoch": 2,
        "loss": 3.25,
        "perplexity": 25.79,
        "learning_rate": 3e-4,
        "best_metric": None,
    }
    contents = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "metadata": facts,
        "scheduler_state_dict": scheduler.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, path)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return contents


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bias": False, "tied": False, "ratio": 2.5},
        {"vocabulary": 50257, "bias": False},
        {"vocabulary": 50304},
    ],
)
def test_a_converted_model_gives_the_old_logits(
    folder: Path, capsys: pytest.CaptureFixture[str], shape: dict[str, Any]
) -> None:
    old = Path("checkpoints/atlas_best.pt")
    contents = write_old(old, **shape)
    before = {path: path.read_bytes() for path in old.parent.iterdir()}
    assert main(["import", str(old), "--num-heads", str(HEADS)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "checkpoints/imported-atlas_best/atlas_best.pt"
    assert {path: path.read_bytes() for path in before} == before
    loaded = load_model(said.out.strip())
    tokens = torch.randint(50257, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = old_logits(contents["model_state_dict"], tokens)[..., :50257]
        assert float((loaded.model(tokens) - expected).abs().max()) <= 1e-4
    assert float(expected.abs().max()) > 3
    config = loaded.model.config
    assert (config.mlp, config.norm_eps, config.vocab_size) == ("gelu_exact", 1e-5, 50257)
    assert config.mlp_size == int(32 * shape.get("ratio", 4.0))
    assert config.tie_embeddings is shape.get("tied", True)
    assert loaded.tokenizer.fingerprint == Tokenizer.gpt2().fingerprint
    assert "the weights after 3,000 steps are converted, but not the optimizer state" in said.err
    assert "assumes gelu and 1e-5, the defaults of Atlas 1.x" in said.err
    extra = shape.get("vocabulary", 50261) - 50257
    assert (f"the last {extra} of " in said.err) is (extra > 0)


def test_heads_and_epsilon_come_from_the_config_of_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = write_old(Path("old.pt"))
    Path("old.yaml").write_text(
        "model: {hidden_size: 32, num_layers: 2, num_heads: 4, max_seq_len: 24, vocab_size: 50261, mlp_ratio: 4.0, "
        "norm_eps: 1e-3, activation: gelu}\ntokenizer: {name: gpt2}\n",
        encoding="utf-8",
    )
    assert main(["import", "old.pt", "--config", "old.yaml"]) == 0
    assert "assumes gelu" not in capsys.readouterr().err
    loaded = load_model("checkpoints/imported-old/atlas_best.pt")
    tokens = torch.arange(CONTEXT)[None] * 1000
    with torch.no_grad():
        expected = old_logits(contents["model_state_dict"], tokens, eps=1e-3)[..., :50257]
        assert float((loaded.model(tokens) - expected).abs().max()) <= 1e-4
    torch.save(contents | {"config": {"num_heads": 2}}, "with_config.pt")  # which its exporter looks for
    assert main(["import", "with_config.pt"]) == 0
    assert load_model("checkpoints/imported-with_config/atlas_best.pt").model.config.num_heads == 2
    assert main(["import", "with_config.pt", "--num-heads", "4", "--output-dir", "four"]) == 0
    assert load_model("four/atlas_best.pt").model.config.num_heads == 4


def test_a_converted_model_is_fine_tuned_and_exported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_old(Path("old.pt"))
    Path("text.txt").write_text(corpus(), encoding="utf-8")
    assert main(["import", "old.pt", "--num-heads", "4", "--output-dir", "base"]) == 0
    command = "train --init-from base/atlas_best.pt --train-data text.txt --output-dir tuned --max-steps 2"
    assert main([*command.split(), "--batch-size", "2", "--set", "training.warmup_steps=0"]) == 0
    assert load_model("tuned/atlas_best.pt").model.config.mlp == "gelu_exact"
    assert main(["export", "--checkpoint", "base/atlas_best.pt", "--format", "hf", "--output", "hf"]) == 0
    assert json.loads(Path("hf/config.json").read_text(encoding="utf-8"))["activation_function"] == "gelu"
    capsys.readouterr()
    assert main(["export", "--checkpoint", "base/atlas_best.pt", "--no-verify"]) == 0
    assert "llama.cpp computes the tanh approximation of GELU" in capsys.readouterr().err


COMMANDS = (
    "generate --prompt a --checkpoint {}",
    "train --train-data text.txt --resume {}",
    "train --train-data text.txt --init-from {}",
    "export --checkpoint {}",
    "evaluate --data text.txt --checkpoint {}",
    "look --prompt a --checkpoint {}",
    "serve --checkpoint {}",
    "info {}",
    "info --verify {}",
)


def test_everywhere_else_an_old_checkpoint_is_recognised(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its JSON file, which looks like a sidecar that does not fit, and without."""
    Path("text.txt").write_text(corpus(), encoding="utf-8")
    for path in ("checkpoints/atlas_best.pt", "alone.pt"):
        write_old(Path(path))
    Path("alone.json").unlink()
    for path in ("checkpoints/atlas_best.pt", "alone.pt"):
        for command in COMMANDS:
            assert main(command.format(path).split()) == 2, command
            message = capsys.readouterr().err
            expected = f"{path}: is a checkpoint of Atlas 1.x; convert it with: atlas import {path}"
            assert message == f"error: {expected}\n", command
    assert main(["info", "checkpoints"]) == 0
    assert "of Atlas 1.x: convert it with atlas import" in capsys.readouterr().out
    assert main(["train", "--config", "nano", "--train-data", "text.txt"]) == 2
    assert "is a checkpoint of Atlas 1.x; convert it with atlas import" in capsys.readouterr().err


def broken(contents: dict[str, Any], what: str) -> dict[str, Any]:
    weights = dict(contents["model_state_dict"])
    if what == "missing tensor":
        del weights["blocks.1.ln2.bias"]
    elif what == "unknown tensor":
        weights["blocks.0.gate.weight"] = torch.ones(3)
    elif what == "other shape":
        weights["blocks.1.mlp.fc1.weight"] = torch.ones(128, 31)
    elif what == "no matrix":
        weights["blocks.0.mlp.fc1.weight"] = torch.ones(128)
    elif what == "no tensor":
        weights["ln_f.weight"] = 1.0
    elif what == "whole numbers":
        weights["ln_f.weight"] = torch.ones(32, dtype=torch.int64)
    elif what == "no blocks":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks")}
    elif what == "shared":
        weights["blocks.0.ln1.bias"] = weights["blocks.0.ln2.bias"]
    elif what == "small vocabulary":
        table = weights["lm_head.weight"][:1000].clone()
        weights |= {"lm_head.weight": table, "embeddings.token_embedding.embedding.weight": table}
    elif what == "not old":
        weights = {"weight": torch.ones(3)}
    elif what == "code":
        return contents | {"metadata": Bomb()}
    return contents | {"model_state_dict": weights}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing tensor", "lacks 1 tensors, such as blocks.1.ln2.bias"),
        ("unknown tensor", "holds 1 tensors that Atlas 1.x did not have, such as blocks.0.gate.weight"),
        ("other shape", "the shapes of its tensors do not match: size mismatch"),
        ("no matrix", "an embedding or fc1 is not a matrix"),
        ("no tensor", "ln_f.weight is not a matrix or vector of floating-point numbers"),
        ("whole numbers", "ln_f.weight is not a matrix or vector of floating-point numbers"),
        ("no blocks", "lacks 1 tensors, such as blocks.0.ln1.weight"),
        ("shared", "several of its tensors share memory"),
        (
            "small vocabulary",
            "has 1,000 tokens, but tokenizer gpt2 has 50,257: name the right tokenizer with --tokenizer",
        ),
        ("not old", "is not a checkpoint of Atlas 1.x: give a checkpoint of Atlas 1.x, or a folder"),
        ("code", "refused without running it (it imports io.open)"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], what: str, reason: str
) -> None:
    torch.save(broken(write_old(Path("old.pt")), what), "old.pt")
    assert main(["import", "old.pt", "--num-heads", "4"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: old.pt: ")
    assert reason in message
    assert message.count("\n") == 1
    assert not Path("checkpoints").exists()
    assert not Path("exploded").exists()


def test_a_wrong_shape_is_refused_and_nothing_is_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_old(Path("checkpoints/atlas_best.pt"))
    for name, section in {
        "other": "hidden_size: 64",
        "silu": "activation: silu",
        "words": "num_heads: many",
    }.items():
        Path(f"{name}.yaml").write_text(f"model: {{{section}}}\n", encoding="utf-8")
    Path("file").touch()
    for arguments, reason in {
        "checkpoints/atlas_best.pt": "does not record its number of attention heads: name the config that the model "
        "was trained with (--config FILE), or set --num-heads to one of 1, 2, 4 (hidden_size 32)",
        "checkpoints/atlas_best.pt --num-heads 5": "hidden_size 32 is not divisible by num_heads 5",
        "checkpoints/atlas_best.pt --num-heads 0": "--num-heads 0: ",
        "checkpoints/atlas_best.pt --config other.yaml": "has hidden_size 32, but the config has 64",
        "checkpoints/atlas_best.pt --config silu.yaml": "the activation silu, which Atlas does not support",
        "checkpoints/atlas_best.pt --config words.yaml": "must be a number",
        "checkpoints/atlas_best.pt --config none.yaml": "none.yaml: no such config file",
        "checkpoints/atlas_best.pt --output-dir checkpoints": "checkpoints: is not empty; choose another --output-dir",
        "checkpoints/atlas_best.pt --output-dir file": "file: is a file; choose another --output-dir",
        "checkpoints": "name the file, such as checkpoints/atlas_best.pt",
        "missing.pt": "missing.pt: no such file or folder; give a folder",
        "other.yaml": "other.yaml: is not an Atlas checkpoint",
        ". --num-heads 4": "--num-heads and --config are for a checkpoint of Atlas 1.x (.pt), and . is another",
    }.items():
        assert main(["import", *arguments.split()]) == 2, arguments
        message = capsys.readouterr().err
        assert reason in message, arguments
        assert message.count("\n") == 1
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["atlas_best.json", "atlas_best.pt"]
    assert main(["import", "checkpoints/atlas_best.pt", "--num-heads", "4"]) == 0
    assert main(["import", "checkpoints/atlas_best.pt", "--num-heads", "4"]) == 2
    assert "checkpoints/imported-atlas_best: is not empty" in capsys.readouterr().err
    # What a killed import leaves does not count.
    Path("checkpoints/imported-atlas_best/atlas_best.pt").rename(
        "checkpoints/imported-atlas_best/atlas_writing.tmp"
    )
    assert main(["import", "checkpoints/atlas_best.pt", "--num-heads", "4"]) == 0
    names = sorted(path.name for path in Path("checkpoints/imported-atlas_best").iterdir())
    assert names == ["atlas_best.json", "atlas_best.pt"]
    assert main(["import", "checkpoints/imported-atlas_best/atlas_best.pt", "--output-dir", "again"]) == 2
    assert "needs no import: it already has the current format" in capsys.readouterr().err
