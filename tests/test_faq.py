"""The questions that users ask first, walked with the commands and the Python they are answered with.

A command here is what the FAQ shows, to the letter; only paths and sizes are a test's. They run in the order in which
a user would come to them, in one folder, each stage being a fixture that rests on the one before.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from atlas.config import AtlasConfig, TrainingConfig
from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import preset_names
from atlas.data import TextDataset, open_dataset
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.logs.run_log import RunLog
from atlas.training.optimizers.build import build_optimizer
from atlas.training.train import train
from tests.conftest import corpus
from tests.project import ARTICLES, CONFIG, ROOT, Project, Stage
from tests.runs import run_for, same_bits
from tests.toy import CharacterTokenizer

# The stages


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("faq"))


@pytest.fixture(scope="module")
def prepared(project: Project) -> Stage:
    return project.run_process("python scripts/prepare_data.py --input data/raw/archive.zip")


TRAIN = "python scripts/train.py --config configs/default.yaml --train-data data/processed/wikipedia"


@pytest.fixture(scope="module")
def interrupted(project: Project, prepared: Stage) -> Stage:
    """Ctrl-C in the tenth step, after which an evaluation is due."""
    advance = RunLog.advance

    def press_ctrl_c(log: RunLog, step: int) -> None:
        advance(log, step)
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "advance", press_ctrl_c)
        return project.run(TRAIN)


@pytest.fixture(scope="module")
def trained(project: Project, interrupted: Stage) -> Stage:
    """The same command once more, and Enter at its question."""
    return project.run(TRAIN, typed="\n")


@pytest.fixture(scope="module")
def resumed_from_step(project: Project, trained: Stage) -> Stage:
    return project.run(
        "python scripts/train.py --config configs/default.yaml --resume checkpoints/atlas_step_28.pt"
    )


@pytest.fixture(scope="module")
def resumed_from_best(project: Project, resumed_from_step: Stage) -> Stage:
    project.write("configs/default.yaml", CONFIG.replace("max_steps: 44", "max_steps: 50"))
    return project.run_process(
        "python scripts/train.py --config configs/default.yaml --resume checkpoints/best_model.pt"
    )


@pytest.fixture
def best(project: Project, resumed_from_best: Stage) -> dict[str, Any]:
    """The best checkpoint, read by PyTorch alone."""
    return torch.load(project.checkpoints / "atlas_best.pt", weights_only=True)  # type: ignore[no-any-return]


# Where do I get training data?


def test_preparing_the_archive(project: Project, prepared: Stage) -> None:
    assert prepared.code == 0, prepared.errors
    folder = project.folder / "data" / "processed" / "wikipedia"
    splits = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == len(ARTICLES)
    dataset, gpt2 = open_dataset(folder), Tokenizer.gpt2()
    texts = []
    for name in ("train", "val"):
        stream = dataset.split(name)
        assert stream is not None
        assert stream.num_tokens == splits[name]["tokens"] == len(np.load(folder / f"{name}-00000.npy"))
        assert f"{stream.num_documents:,} documents" in prepared.output
        texts += gpt2.decode(stream.read(0, stream.num_tokens).tolist()).split("<|endoftext|>")[:-1]
    assert sorted(texts) == sorted(ARTICLES)  # every article once, although the archive has each twice


# How do I start training? Can I stop and resume later? When are checkpoints saved?


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(project: Project, interrupted: Stage) -> None:
    assert interrupted.code == 130, interrupted.errors
    assert interrupted.steps("interrupt") == [10]
    said = interrupted.errors.replace("\\", "/")
    assert re.search(r"resume with: (atlas|\S+ -m atlas) train --resume checkpoints/atlas_interrupt", said)
    contents = torch.load(project.checkpoints / "atlas_interrupt_step_10.pt", weights_only=True)
    assert contents["step"] == 10


def test_the_same_command_detects_the_checkpoint_and_asks_whether_to_resume(trained: Stage) -> None:
    assert trained.code == 0, trained.errors
    assert "checkpoints holds this run at step 10. Resume it?" in trained.errors
    assert "atlas_interrupt_step_10.pt at step 10 of 44" in trained.errors
    assert list(trained.losses()) == list(range(1, 45))
    assert trained.losses()[44] < trained.losses()[1] - 3


def test_four_kinds_of_checkpoints_are_kept(trained: Stage) -> None:
    assert trained.steps("step") == [21, 28, 35, 42, 44]  # of 7, 14, … 42 and the last, five are kept
    epochs = {name: card for name, card in trained.sidecars.items() if card["kind"] == "epoch"}
    last = max(card["epoch"] for card in epochs.values())
    assert last > 5
    assert sorted(card["epoch"] for card in epochs.values()) == list(range(last - 4, last + 1))
    assert all(name == f"atlas_epoch_{card['epoch']}_step_{card['step']}" for name, card in epochs.items())
    assert trained.steps("interrupt") == [10]
    validation = {line["step"]: line["val_loss"] for line in trained.metrics if line["kind"] == "validation"}
    assert list(validation) == [10, 20, 30, 40, 44]
    assert trained.sidecars["atlas_best"]["val_loss"] == min(validation.values())
    assert (AtlasConfig().checkpoint.save_interval, AtlasConfig().checkpoint.keep_checkpoints) == (100, 5)


def test_what_is_watched_while_training(project: Project, trained: Stage) -> None:
    log = (project.checkpoints / "training.log").read_text(encoding="utf-8")
    for shown in ("loss ", "ppl ", "it/s", "tok/s"):
        assert shown in trained.errors
        assert shown in log
    for line in trained.metrics:
        if line["kind"] == "train":
            assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
            assert line["tokens_per_second"] == pytest.approx(line["steps_per_second"] * 20 * 16, rel=0.01)
    card = trained.sidecars["atlas_step_44"]
    assert card["loss"] == trained.losses()[44]
    assert card["perplexity"] == pytest.approx(math.exp(card["loss"]))


def test_resuming_from_a_step_takes_the_same_steps_again(
    project: Project, trained: Stage, resumed_from_step: Stage
) -> None:
    assert resumed_from_step.code == 0, resumed_from_step.errors
    assert "atlas_step_28.pt at step 28 of 44" in resumed_from_step.errors
    assert resumed_from_step.losses() == trained.losses()  # to the last bit
    assert resumed_from_step.steps("step")[-1] == 44
    aside = {path.name for path in (project.checkpoints / "previous-1").iterdir()}
    assert {"atlas_step_35.pt", "atlas_step_44.pt", "atlas_step_44.json"} <= aside
    assert not {"atlas_step_28.pt", "atlas_step_21.pt"} & aside


def test_resuming_from_the_best(resumed_from_step: Stage, resumed_from_best: Stage) -> None:
    best = resumed_from_step.sidecars["atlas_best"]["step"]
    assert resumed_from_best.code == 0, resumed_from_best.errors
    assert f"atlas_best.pt at step {best} of 50" in resumed_from_best.errors
    assert list(resumed_from_best.losses()) == list(range(1, 51))
    assert resumed_from_best.steps("step")[-1] == 50


# How do I load a checkpoint?


def test_loading_a_checkpoint_in_python(
    project: Project, best: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    model = AtlasLM(resolve(best["config"]).model)
    optimizer = build_optimizer(model, TrainingConfig())
    names: dict[str, Any] = {"model": model, "optimizer": optimizer}
    snippet = """
        from atlas.training.checkpoint import CheckpointManager

        # Load checkpoint
        manager = CheckpointManager("checkpoints/")
        checkpoint = manager.load_checkpoint("checkpoints/best_model.pt")

        # Access components
        model.load_state_dict(checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        step = checkpoint["step"]
        loss = checkpoint["loss"]
        """
    exec(textwrap.dedent(snippet), names)
    card = json.loads((project.checkpoints / "atlas_best.json").read_text(encoding="utf-8"))
    assert (names["step"], names["loss"]) == (card["step"], card["loss"])
    assert same_bits(dict(model.state_dict()), best["model_state_dict"])
    assert same_bits(optimizer.state_dict()["state"], best["optimizer_state_dict"]["state"])


# How do I generate text?

GENERATE = 'python scripts/infer.py --checkpoint checkpoints/best_model.pt --prompt "Town 7" --temperature 0'


def speaks_of_towns(text: str) -> bool:
    return any(word in text for word in ("Town", "mills", "river"))


@pytest.fixture
def known_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed of chance now and then ends a text before its first word."""
    monkeypatch.setattr("secrets.randbelow", lambda below: 1)


@pytest.mark.usefixtures("best", "known_seed")
def test_generating_text(project: Project) -> None:
    basic = project.run("""
        python scripts/infer.py \\
          --checkpoint checkpoints/best_model.pt \\
          --prompt "Once upon a time"
        """)
    assert basic.code == 0, basic.errors
    assert basic.output.startswith("Once upon a time")
    assert speaks_of_towns(basic.output)
    assert "seed 1\n" in basic.errors


@pytest.mark.usefixtures("best", "known_seed")
def test_generating_text_with_every_option(project: Project) -> None:
    advanced = project.run("""
        python scripts/infer.py \\
          --checkpoint checkpoints/best_model.pt \\
          --prompt "The meaning of life is" \\
          --max-tokens 100 \\
          --temperature 0.8 \\
          --top-k 50 \\
          --top-p 0.95
        """)
    assert advanced.code == 0, advanced.errors
    text = advanced.output.removeprefix("The meaning of life is").removesuffix("\n")
    assert 0 < len(Tokenizer.gpt2().encode(text)) <= 100
    assert speaks_of_towns(text)


@pytest.mark.usefixtures("best")
def test_a_process_of_its_own_writes_the_same_text(project: Project) -> None:
    assert project.run_process(GENERATE).output == project.run(GENERATE).output


def test_what_the_generation_parameters_do(project: Project, best: dict[str, Any]) -> None:
    greedy = project.run(GENERATE).output
    assert project.run(GENERATE).output == greedy
    assert project.run(GENERATE.replace("--temperature 0", "--top-k 1")).output == greedy
    assert project.run(GENERATE.replace("--temperature 0", "--top-p 0.000001")).output == greedy
    shorter = project.run(GENERATE + " --max-tokens 5").output
    assert greedy.startswith(shorter.rstrip("\n"))
    assert len(shorter) < len(greedy)
    drawn = [project.run(GENERATE.replace("--temperature 0", f"--seed {seed}")).output for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_checkpoint_is_one_file_that_can_be_taken_elsewhere(
    project: Project, best: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copy(project.checkpoints / "atlas_best.pt", tmp_path / "mine.pt")
    elsewhere = GENERATE.replace("checkpoints/best_model.pt", shlex.quote(str(tmp_path / "mine.pt")))
    assert project.run(elsewhere).output == project.run(GENERATE).output


# Can I export my model?

EXPORT = """
    python scripts/export_gguf.py \\
      --checkpoint checkpoints/best_model.pt \\
      --output atlas_model.gguf \\
      --quantize f16  # or f32
    """


@pytest.fixture
def _no_memory_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GGUFReader` takes a slice for each token of the vocabulary; of a memory map, that is four times as slow."""
    monkeypatch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, dtype=np.uint8))


@pytest.mark.usefixtures("_no_memory_map")
@pytest.mark.parametrize("kind", ["f16", pytest.param("f32", marks=pytest.mark.slow)])
def test_exporting_to_gguf(project: Project, best: dict[str, Any], kind: str) -> None:
    exported = project.run(EXPORT.replace("f16  # or f32", kind))
    assert exported.code == 0, exported.errors
    assert "proved: " in exported.errors or "NOT VERIFIED" in exported.errors
    reader = gguf.GGUFReader(project.folder / "atlas_model.gguf")
    fields = {name: reader.fields[name] for name in reader.fields}
    assert fields["general.architecture"].contents() == "gpt2"
    for name, value in {"block_count": 2, "embedding_length": 8, "context_length": 16}.items():
        assert fields[f"gpt2.{name}"].contents() == value
    assert len(fields["tokenizer.ggml.tokens"].data) == 50257
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 50256
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = best["model_state_dict"]
    assert len(tensors) == len(weights)
    for name, ours in {
        "token_embd.weight": weights["token_embedding.weight"][:50257],
        "position_embd.weight": weights["position_embedding.weight"],
        "blk.0.attn_qkv.weight": weights["blocks.0.attention.qkv.weight"],
        "blk.1.ffn_down.weight": weights["blocks.1.mlp.down.weight"],
        "blk.1.ffn_norm.bias": weights["blocks.1.mlp_norm.bias"],
        "output_norm.weight": weights["final_norm.weight"],
    }.items():
        rounded = ours.half() if tensors[name].tensor_type == gguf.GGMLQuantizationType.F16 else ours
        assert np.array_equal(tensors[name].data, rounded.numpy()), name
    assert tensors["blk.0.attn_qkv.weight"].tensor_type.name.lower() == kind


@pytest.mark.usefixtures("best")
def test_a_process_of_its_own_writes_the_same_file(project: Project) -> None:
    unproved = EXPORT.replace("f16  # or f32", "f16 --no-verify")
    files = []
    for run in (project.run, project.run_process):
        assert run(unproved).output == "atlas_model.gguf\n"
        files.append((project.folder / "atlas_model.gguf").read_bytes())
    assert files[0] == files[1]


# How do I fine-tune on custom data?


def test_fine_tuning_on_your_data(project: Project, resumed_from_best: Stage) -> None:
    for name in ("a", "b"):
        project.write(f"data/processed/your_data/{name}.txt", corpus(150).replace("river", f"river {name}"))
    shutil.copy(project.checkpoints / "atlas_best.pt", project.checkpoints / "pretrained.pt")
    project.write("configs/default.yaml", CONFIG.replace("max_steps: 44", "max_steps: 8"))
    before = {path: path.stat().st_mtime_ns for path in project.checkpoints.glob("*.*")}
    tuned = project.run(
        """
        python scripts/train.py \\
          --config configs/default.yaml \\
          --train-data data/processed/your_data \\
          --resume checkpoints/pretrained.pt \\
          --learning-rate 1e-5  # Lower LR for fine-tuning
        """,
        output_dir="checkpoints/finetune-your_data",
    )
    assert tuned.code == 0, tuned.errors
    assert "fine-tuning from the weights of" in tuned.errors
    assert list(tuned.losses()) == list(range(1, 9))
    assert max(line.get("learning_rate", 0) for line in tuned.metrics) == pytest.approx(1e-5)
    start = torch.load(project.checkpoints / "pretrained.pt", weights_only=True)["model_state_dict"]
    end = torch.load(project.checkpoints / "finetune-your_data" / "atlas_step_8.pt", weights_only=True)[
        "model_state_dict"
    ]
    moved = max((end[name] - start[name]).abs().max().item() for name in start)
    assert 0 < moved <= 8 * 1e-5 * 1.1  # at most the learning rate a step
    assert {path: path.stat().st_mtime_ns for path in before} == before


# Can I create custom configurations? Memory, speed


def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "my_config.yaml"
    path.write_text(
        textwrap.dedent("""\
        # configs/my_config.yaml
        model:
          hidden_size: 768      # Model dimension
          num_layers: 12        # Transformer blocks
          num_heads: 12         # Attention heads
          vocab_size: 50257     # Vocabulary size
          max_seq_len: 512      # Context length
          
        training:
          batch_size: 4
          learning_rate: 3e-4
          max_steps: 100000
        """),  # noqa: W293
        encoding="utf-8",
    )
    config = resolve(read_yaml(path))
    assert config.training.learning_rate == 0.0003
    assert (config.training.batch_size, config.training.max_steps) == (4, 100_000)
    with torch.device("meta"):
        parameters = AtlasLM(config.model).num_parameters()
    assert parameters == 124_439_808 - 512 * 768  # GPT-2 small's, with half of its 1,024 positions


def test_what_saves_memory_changes_no_loss(project: Project, trained: Stage) -> None:
    """Batch 1 with accumulation, and gradient checkpointing; a worker that reads ahead besides."""
    saving = CONFIG.replace("batch_size: 4", "batch_size: 1\n  gradient_accumulation_steps: 4")
    saving = saving.replace("max_steps: 44", "max_steps: 44\n  gradient_checkpointing: true")
    project.write("configs/saving.yaml", saving + "device: cpu\ndata:\n  num_workers: 1\n")
    run = project.run(
        "python scripts/train.py --config configs/saving.yaml --train-data data/processed/wikipedia "
        "--max-steps 4 --output-dir saving",
        output_dir="saving",
    )
    assert run.code == 0, run.errors
    # Warm-up is alike whatever the number of steps, and the fourth loss comes before the fourth update.
    for step, loss in run.losses().items():
        assert loss == pytest.approx(trained.losses()[step], rel=1e-5)


# Can I use a custom tokenizer?


class YourTokenizer(CharacterTokenizer):
    def __init__(self, *settings: object) -> None:
        pass


class YourSubclass(Tokenizer):
    """The interface implemented in full."""

    name = "letters"
    vocab_size = 257
    eos_id = 256
    fingerprint = "letters-1"

    def __init__(self, *settings: object) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        return {
            "kind": "custom",
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": 257,
            "eos_id": 256,
        }

    def save(self, path: str | Path) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("yours", [YourTokenizer, YourSubclass])
def test_a_custom_tokenizer(yours: type, text_file: Path) -> None:
    snippet = """
        from atlas.tokenizer import Tokenizer

        # Use your tokenizer
        custom_tokenizer = YourTokenizer(...)
        dataset = TextDataset(files, tokenizer=custom_tokenizer)
        """
    names: dict[str, Any] = {"YourTokenizer": yours, "TextDataset": TextDataset, "files": [text_file]}
    exec(textwrap.dedent(snippet), names)
    inputs, targets = names["dataset"][0]
    expected = list(text_file.read_bytes()[: len(inputs) + 1])
    assert inputs.tolist() == expected[:-1]
    assert targets.tolist() == expected[1:]


# How do I implement a custom loss?


def test_a_custom_loss(project: Project, trained: Stage) -> None:
    snippet = '''\
        from atlas.training.loss import compute_lm_loss

        def custom_loss(logits, targets, mask=None):
            """Your custom loss function."""
            base_loss = compute_lm_loss(logits, targets)
            # Add your modifications
            modified_loss = base_loss + 2
            return modified_loss
        '''
    project.write("your_loss.py", textwrap.dedent(snippet))
    run = project.run(
        f"{TRAIN} --set training.loss=your_loss:custom_loss --max-steps 2 --output-dir custom",
        output_dir="custom",
    )
    assert run.code == 0, run.errors
    assert run.losses()[1] == pytest.approx(trained.losses()[1] + 2, rel=1e-6)


# Which configuration should I choose?


@pytest.mark.slow
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_takes_a_real_step(preset: str, text_file: Path, tmp_path: Path) -> None:
    """One sequence of 64 tokens. Saved to a disk, the larger ones would fill it: 6 GB under each of two names. Where
    blocks begin as the identity, what is inside them gets its first gradient in the second step."""
    layer = read_yaml(ROOT / "configs" / f"{preset}.yaml")
    steps = 2 if layer["model"].get("init") == "scaled" else 1
    layer["training"] |= {
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "warmup_steps": 0,
        "learning_rate": 1e-4,
    }
    layer["model"] |= {"max_seq_len": 64}
    layer |= {
        "device": "cpu",
        "data": {"train_data": str(text_file)},
        "checkpoint": {"output_dir": str(tmp_path), "background": False},
    }
    run = run_for(layer)
    saved: list[list[str]] = []
    run.checkpoints.save = lambda contents, kinds: saved.append(kinds) or []  # type: ignore[method-assign]
    before = run.model.blocks[0].mlp.up.weight.detach().clone()
    result = train(run)
    assert (result.outcome, result.step) == ("finished", steps)
    assert saved == [["best", "step"]]
    assert result.loss == pytest.approx(math.log(50257), rel=0.05 * steps)
    assert not torch.equal(run.model.blocks[0].mlp.up.weight, before)
    state = run.optimizer.state_dict()["state"]
    assert len(state) == len(list(run.model.parameters()))
    for entry in state.values():  # whatever the optimizer keeps, a gradient reached every tensor
        assert any(torch.is_tensor(kept) and kept.any() for name, kept in entry.items() if name != "step")
