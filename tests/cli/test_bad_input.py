"""Every mistake of a user gives one line with the value and the remedy, and exit code 2; nothing is written or lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import atlas.errors
from atlas.cli import COMMANDS, _build_app, main
from atlas.errors import AtlasError, explain
from atlas.files import local_path, sha256_of
from tests.conftest import corpus

ROOT = Path(__file__).parents[2]

SMALL = """\
device: cpu
model: {hidden_size: 16, num_layers: 2, num_heads: 2, max_seq_len: 16}
training: {batch_size: 2, max_steps: 2, warmup_steps: 1}
"""

CONFIGS = {
    "small": SMALL,
    "unknown": SMALL + "zebra: red\n",
    "misspelt": SMALL.replace("model:", "modle:"),
    "misplaced": SMALL.replace("max_steps", "hidden_size"),
    "twice": SMALL.replace("batch_size: 2", "batch_size: 2, batch_size: 3"),
    "indivisible": SMALL.replace("num_heads: 2", "num_heads: 3"),
    "vocabulary": SMALL.replace("num_heads: 2", "num_heads: 2, vocab_size: 50257"),
    "prose": "just some words\n",
    "unclosed": "device: cpu\nmodel: {hidden_size: 16\n",
    "cuda": SMALL.replace("device: cpu", "device: cuda"),
    "gpu": SMALL.replace("device: cpu", "device: gpu"),
    "negative": SMALL.replace("batch_size: 2", "batch_size: -5"),
    "words": SMALL.replace("max_steps: 2", "max_steps: many"),
}


class Bomb:
    """To unpickle it opens a file for writing."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("exploded", "w")


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, three datasets, and damaged copies of such. Nothing may change in it."""
    folder = tmp_path_factory.mktemp("bad_input") / "workshop"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ATLAS_CACHE_DIR", str(tmp_path_factory.mktemp("bad_input_cache")))
        write_texts()
        for command in (
            "prepare --input river.txt --output own --train-tokenizer 300",
            "prepare --input river.txt --output characters --tokenizer tests.toy:tokenizer",
            "prepare --input river.txt --output gpt2",
            "train --config small.yaml --train-data own",
            "train --config small.yaml --train-data characters --tokenizer tests.toy:tokenizer --output-dir custom",
        ):
            assert main(shlex.split(command)) == 0, command
        write_broken_checkpoints()
        write_broken_datasets()
        write_broken_archives()
    return folder


def write_texts() -> None:
    for name, text in CONFIGS.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    Path("other.txt").write_text(corpus()[::-1], encoding="utf-8")
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n\t\n", encoding="utf-8")
    Path("utf16.txt").write_text("words in another encoding", encoding="utf-16")
    Path("binary.txt").write_bytes(bytes(range(256)))
    Path("rows.jsonl").write_text('\n{"body": "not"}\n', encoding="utf-8")
    Path("nothing").mkdir()
    Path("pictures").mkdir()
    Path("pictures/cat.png").write_bytes(b"\x89PNG")


def write_broken_checkpoints() -> None:
    broken, best = Path("broken"), Path("checkpoints/atlas_best.pt")
    broken.mkdir()
    size = best.stat().st_size
    (broken / "cut_off.pt").write_bytes(best.read_bytes()[:-1000])
    shutil.copy(best, broken / "flipped.pt")
    flip_byte(broken / "flipped.pt", size // 2)
    for name in ("atlas_step_2.pt", "atlas_step_2.json"):
        shutil.copy(Path("checkpoints", name), broken)
    flip_byte(broken / "atlas_step_2.pt", size // 2)
    (broken / "text.pt").write_text("not a checkpoint", encoding="utf-8")
    (broken / "empty.pt").touch()
    (broken / "pickled.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"format_version": 1, "model_state_dict": Bomb()}, broken / "bomb.pt")
    torch.save({"weight": torch.zeros(3)}, broken / "foreign.pt")
    contents = torch.load(best, weights_only=True)
    torch.save(contents | {"format_version": 99}, broken / "later.pt")
    torch.save(contents | {"model_state_dict": {}}, broken / "hollow.pt")
    (broken / "model.gguf").write_bytes(b"GGUF\x03\x00")


def write_broken_datasets() -> None:
    for name in (
        "bad_header",
        "bad_ids",
        "bad_size",
        "no_shard",
        "bad_json",
        "no_tokenizer",
        "odd",
        "edited",
    ):
        shutil.copytree("own", name)
    flip_byte(Path("bad_header/train-00000.npy"), 3)
    flip_byte(Path("bad_ids/train-00000.npy"), 301)  # the upper byte of an id
    shard = Path("bad_size/train-00000.npy")
    shard.write_bytes(shard.read_bytes()[:-100])
    Path("no_shard/train-00000.npy").unlink()
    Path("no_tokenizer/tokenizer.json").unlink()
    Path("bad_json/dataset.json").write_text('{"format": "atlas-data', encoding="utf-8")
    Path("odd/dataset.json").write_text("[]", encoding="utf-8")
    manifest = json.loads(Path("edited/dataset.json").read_text(encoding="utf-8"))
    manifest["splits"]["train"]["tokens"] += 1
    Path("edited/dataset.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_broken_archives() -> None:
    members = {
        "parent": "../evil.txt",
        "deep": "a/../../evil.txt",
        "absolute": "/evil.txt",
        "drive": "C:\\evil.txt",
    }
    for name, member in members.items():
        with zipfile.ZipFile(f"{name}.zip", "w") as archive:
            archive.writestr(member, corpus())
    zipfile.ZipFile("hollow.zip", "w").close()
    Path("torn.zip").write_bytes(Path("parent.zip").read_bytes()[:200])


# Commands, and what their one line must say, in this order: the value, the reason, the remedy.
MISTAKES = {
    "train --train-data own --output-dir new --config": {
        "unknown.yaml": "unknown.yaml … unknown setting zebra … docs/CONFIG.md",
        "misspelt.yaml": "misspelt.yaml … modle … did you mean model?",
        "misplaced.yaml": "training.hidden_size … write it as model.hidden_size",
        "twice.yaml": "twice.yaml line 3 … 'batch_size' is given twice",
        "indivisible.yaml": "num_heads 3 … use hidden_size 12 or 18, or a num_heads that divides 16",
        "vocabulary.yaml": "model.vocab_size: 50257 … own has 300 tokens: remove vocab_size",
        "negative.yaml": "training.batch_size: -5: must be",
        "words.yaml": "training.max_steps: 'many': must be a number",
        "gpu.yaml": "device: 'gpu': must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'",
        "prose.yaml": "prose.yaml … sections such as `model:`",
        "unclosed.yaml": "unclosed.yaml line 3 … expected",
        "binary.yaml": "binary.yaml … not UTF-8 text; give a YAML file",
        "smal.yaml": "smal.yaml: no such config file; did you mean small.yaml?",
        "nothing": "nothing: is a folder; name a config file in it",
        "smalll": "smalll: no such preset; did you mean small?",
        "gigantic": "gigantic: no such preset; the presets are nano, modern-nano, tiny, modern, small",
    },
    "train --config small.yaml --output-dir new --train-data": {
        "data/processed/missing": "data/processed/missing: no such file or folder; give text, JSON, a table",
        "empty.txt": "empty.txt: holds no text",
        "blank.txt": "blank.txt: holds no text",
        "nothing": "nothing: nothing to read; give text, JSON, a table",
        "pictures": "pictures: nothing to read … left out … cat.png … give text, JSON, a table",
        "pictures/cat.png": "cat.png: cannot be read: a picture",
        "short.txt": "short.txt: 4 tokens are too few … max_seq_len 16 … give more text, or",
        "short.txt --overfit-batch": "short.txt: 4 tokens are too few … give more text, or",
        "own --set model.max_seq_len=99999": "own … too few … a smaller model.max_seq_len",
        "binary.txt": "binary.txt: cannot be read: a binary file",
        "rows.jsonl": "rows.jsonl line 2: has no field 'text' (fields: body); name the field",
        "bad_header": "bad_header/train-00000.npy … prepare the dataset again",
        "bad_ids": "bad_ids … token id … 300 tokens; prepare the dataset again",
        "bad_size": "bad_size/train-00000.npy … bytes instead of … prepare the dataset again",
        "no_shard": "no_shard/train-00000.npy: missing … prepare the dataset again",
        "bad_json": "bad_json/dataset.json: cannot be read … prepare the dataset again",
        "odd": "odd/dataset.json … prepare it with atlas prepare",
        "edited": "edited/dataset.json … not the sum of its shards; prepare the dataset again",
        "no_tokenizer": "no_tokenizer/tokenizer.json … prepare the dataset again",
        "own --val-data missing.txt": "missing.txt: no such file or folder",
        "own --val-data empty.txt": "empty.txt: holds no text",
        "own --tokenizer gpt2": "own: was prepared with tokenizer bpe … not with gpt2 … give the text",
        "own --val-data gpt2": "gpt2: was prepared with tokenizer gpt2 … not with bpe … give the text",
        "gpt2 --resume checkpoints/best_model.pt": "gpt2: was prepared … not with bpe … give the text",
        "gpt2 --init-from checkpoints/best_model.pt": "gpt2: was prepared … not with bpe … give the text",
        "characters": "tests.toy:tokenizer … name it with --tokenizer",
        "own --resume custom/best_model.pt": "tests.toy:tokenizer … name it with --tokenizer",
        "river.txt --tokenizer missing.json": "missing.json: no such file; give gpt2, a tokenizer.json",
        "river.txt --tokenizer broken/text.pt": "broken/text.pt: is not a tokenizer.json",
        "parent.zip": "parent.zip: member '../evil.txt' points outside the archive",
    },
    "train --config small.yaml --train-data own": {
        "--max-stepz 3": "--max-stepz … --max-steps … see atlas train --help",
        "--max-steps": "--max-steps … argument; see atlas train --help",
        "--max-steps abc": "training.max_steps: 'abc': must be a number",
        "--max-steps 0": "training.max_steps: '0': must be",
        "--max-steps 1.5": "training.max_steps: '1.5': must be a whole number",
        "--learning-rate fast": "training.learning_rate: 'fast': must be a number",
        "--learning-rate -1": "training.learning_rate: -1.0: must be greater than 0",
        "--learning-rate nan": "training.learning_rate: nan: must be",
        "--batch-size 0": "training.batch_size: 0: must be",
        "--seed -1": "seed: -1: must be",
        "--device tpu": "device: 'tpu': must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'",
        "--set training.batchsize=3": "training.batchsize … did you mean training.batch_size?",
        "--set training.batch_size": "--set training.batch_size: write it as section.key=value",
        "--set batch_size=3": "batch_size … write it as training.batch_size",
        "--set training.precision=fp16 --no-resume": "fp16: a CPU has no fast arithmetic for it; use fp32 or auto",
        "--set training.loss=nowhere:loss --no-resume": "nowhere:loss … write it as package.module",
        "--set training.loss=loss --no-resume": "training.loss: loss: write it as package.module:function",
        "--output-dir river.txt": "river.txt: cannot be written … choose another --output-dir",
        "--output-dir river.txt/run": "river.txt/run: cannot be written … choose another --output-dir",
        "--output-dir custom": "tests.toy:tokenizer … custom … --output-dir … --no-resume",
        "--set model.num_layers=3": "num_layers 2 → 3 … checkpoints … --output-dir … --no-resume",
        "--resume checkpoints/best_model.pt --output-dir custom": "custom: holds another run … --output-dir",
        "--resume checkpoints/atlas_step_99.pt": "atlas_step_99.pt: no such checkpoint; there are",
        "--resume nowhere/atlas_step_99.pt": "nowhere/atlas_step_99.pt: no such checkpoint; train a model",
        "--resume checkpoints": "checkpoints: is a folder; name a checkpoint in it",
        "--resume checkpoints/best_model.pt --set model.hidden_size=32": "hidden_size 16 → 32 … leave these",
        "--resume checkpoints/best_model.pt --no-resume": "--no-resume and --resume … give one of them",
        "--resume broken/cut_off.pt": "cut_off.pt: is not … or is cut off … take another",
        "--resume broken/bomb.pt": "bomb.pt: is not … refused without running it … take a checkpoint that atlas train",
        "--resume broken/atlas_step_2.pt": "atlas_step_2.pt … sha256 … take another",
        "--init-from broken/hollow.pt --output-dir new": "hollow.pt: its weights do not fit",
    },
    "train": {
        "--config small.yaml --output-dir new": "no training data: set --train-data",
        "--config small.yaml --train-data gpt2": "gpt2 … checkpoints … --output-dir … --no-resume",
        "--config small.yaml --train-data missing": "missing: no such file … the run in checkpoints",
    },
    "generate --prompt Once": {
        "--checkpoint custom/best_model.pt": "tests.toy:tokenizer … name it with --tokenizer",
        "--tokenizer gpt2": "--tokenizer gpt2: is not the tokenizer … atlas_best.pt was trained with",
        "--tokenizer nowhere:factory": "nowhere:factory: cannot be imported … package.module:name",
        "--checkpoint missing/atlas_best.pt": "missing/atlas_best.pt: no such checkpoint; train a model",
        "--checkpoint checkpoints/last.pt": "last.pt: no such checkpoint; there are atlas_best.pt",
        "--checkpoint broken/cut_off.pt": "cut_off.pt: is not … or is cut off … take another",
        "--checkpoint broken/flipped.pt": "flipped.pt: is damaged … take another",
        "--checkpoint broken/text.pt": "text.pt: is not an Atlas checkpoint … take another",
        "--checkpoint broken/empty.pt": "empty.pt: is not an Atlas checkpoint … take another",
        "--checkpoint broken/pickled.pt": "pickled.pt: is not an Atlas checkpoint … take another",
        "--checkpoint broken/bomb.pt": "bomb.pt … without running it (it imports io.open) … take a checkpoint",
        "--checkpoint broken/foreign.pt": "foreign.pt … is not an Atlas checkpoint … take a checkpoint",
        "--checkpoint broken/later.pt": "later.pt … format 99 … update Atlas",
        "--checkpoint broken/hollow.pt": "hollow.pt: its weights do not fit",
        "--interactive": "give one of --prompt TEXT, --prompts-file FILE and --interactive",
        "--temperature -1": "--temperature -1.0: must be 0 or more",
        "--temperature=hot": "--temperature hot: must be a valid number … see atlas generate --help",
        "--top-k -1": "--top-k -1: must be 0 (all) or more",
        "--top-p 2": "--top-p 2.0: must be from 0 to 1",
        "--min-p 2": "--min-p 2.0: must be from 0 to 1",
        "--max-tokens 0": "--max-tokens 0: … 1",
        "--max-tokens abc": "--max-tokens abc: … integer … see atlas generate --help",
        "--num-samples 0": "--num-samples 0: … 1",
        "--device tpu": "device: tpu: is not one of auto, cpu, cuda, cuda:N, mps",
        "--output-file nothing": "--output-file nothing: cannot be written; name a file",
        "--output-file nowhere/out.jsonl": "--output-file nowhere/out.jsonl … an existing folder",
    },
    "generate": {
        "": "give one of --prompt TEXT, --prompts-file FILE and --interactive",
        "--prompt": "'--prompt' … see atlas generate --help",
        "--prompts-file missing.txt": "--prompts-file missing.txt: cannot be read … a prompt on each line",
        "--prompts-file nothing": "--prompts-file nothing: cannot be read … a prompt on each line",
        "--prompts-file blank.txt": "--prompts-file blank.txt: contains no prompt; write one prompt on each line",
        "--prompts-file utf16.txt": "--prompts-file utf16.txt: is not UTF-8 text; save it as UTF-8",
        "--prompt a --dtype q8": "--dtype q8: is not one of auto, f32, bf16, f16",
        "--prompt a --dtype f16": "--dtype f16: a CPU has no fast arithmetic for it; use f32 or auto",
    },
    "evaluate": {
        "--data gpt2": "gpt2: was prepared with tokenizer gpt2 … not with bpe … give the text",
        "--data own --checkpoint broken/bomb.pt": "bomb.pt … without running it",
        "": "give one of --data TEXT and --tasks NAME",
        "--data own --tasks arc_easy": "give one of --data TEXT and --tasks NAME",
        "--tasks ,": "give one of --data TEXT and --tasks NAME",
        "--data own --num-fewshot 0": "--limit and --num-fewshot are for --tasks; omit both options",
        "--tasks arc_easy --worst 3": "--worst 3: is for --data; omit --worst",
        "--tasks arc_easy --limit 0": "--limit 0: … 1",
        "--tasks small.yaml": "--tasks small.yaml: cannot be loaded … fix the file",
        "--tasks nothing": "--tasks nothing: contains no task; name a folder of lm-eval's YAML files",
        "--data missing.txt": "missing.txt: no such file or folder; give text, JSON, a table",
        "--data empty.txt": "empty.txt: holds no text",
        "--data own --batch-size 0": "--batch-size 0: … 1",
    },
    "export": {
        "--checkpoint custom/best_model.pt": "tests.toy:tokenizer … train with gpt2 or a tokenizer.json",
        "--checkpoint broken/bomb.pt": "bomb.pt … without running it",
        "--checkpoint missing.pt": "missing.pt: no such checkpoint",
        "--quantize q9": "--quantize q9 … 'f16' … see atlas export --help",
        "--data missing.txt": "missing.txt: no such file or folder; give text, JSON, a table",
        "--data gpt2": "gpt2: was prepared with tokenizer gpt2 … not with bpe … give the text",
        "--data own --no-verify": "--data: evaluates the file in llama.cpp … omit one of the two options",
        "--data own --format hf": "--data: is for GGUF … omit --data with --format hf",
        "--output nothing": "nothing: is a folder, which Atlas does not replace: choose another name",
        "--output river.txt/model.gguf": "river.txt/model.gguf: cannot be written … choose another place",
    },
    "info": {
        "": "'path'; see atlas info --help",
        "nonsense": "nonsense: no such file or folder, and no preset (nano, modern-nano",
        "missing.pt": "missing.pt: no such checkpoint",
        "river.txt": "river.txt: is not a .pt, .gguf, .json or .yaml file … atlas prepare --input",
        "nothing": "nothing: is neither a prepared dataset nor a folder with checkpoints … atlas prepare --input",
        "broken/bomb.pt": "bomb.pt … without running it",
        "broken/model.gguf": "model.gguf: is not a complete GGUF file",
        "binary.yaml": "binary.yaml … not UTF-8 text",
        "bad_json": "bad_json/dataset.json: cannot be read … prepare the dataset again",
        "bad_ids": "bad_ids: train contains token id … prepare the dataset again",
        "bad_ids --verify": "bad_ids/train-00000.npy: its content changed … prepare the dataset again",
        "broken/atlas_step_2.pt --verify": "is not the file that was saved (damaged … no other checkpoint",
        "broken/cut_off.pt --verify": "cut_off.pt: is not … or is cut off",
        "small.yaml --verify": "--verify: reads checkpoints and datasets",
        "edited/dataset.json": "edited/dataset.json",
    },
    "prepare": {
        "": "--input: is missing; give text, for example data/raw/archive.zip … --list",
        "--input missing.txt": "missing.txt: no such file or folder; give text, JSON, a table",
        "--input empty.txt": "empty.txt: holds no text",
        "--input nothing": "nothing: nothing to read; give text, JSON, a table",
        "--input parent.zip": "parent.zip: member '../evil.txt' points outside the archive",
        "--input deep.zip": "deep.zip: member 'a/../../evil.txt' points outside the archive",
        "--input absolute.zip": "absolute.zip: member '/evil.txt' points outside the archive",
        "--input drive.zip": "drive.zip … evil.txt' points outside the archive",
        "--input hollow.zip": "hollow.zip: nothing to read; give text, JSON, a table",
        "--input torn.zip": "torn.zip: is not a zip archive … download or pack it again",
        "--input river.txt --output river.txt": "river.txt: is a file; choose a folder with --output",
        "--input river.txt --output river.txt/a": "river.txt: is a file; choose a folder with --output",
        "--input river.txt --output checkpoints": "checkpoints: holds other files … choose another folder",
        "--input river.txt --tokenizer gpt3": "gpt3: no such file; give gpt2, a tokenizer.json",
        "--input river.txt --tokenizer gpt2 --train-tokenizer 300": "gpt2 … give one of them",
        "--input river.txt empty.txt": "unexpected extra argument … in quotes",
        "--input river.txt --train-tokenizer 3": "--train-tokenizer 3: a vocabulary must have at least 257",
        "--input river.txt --train-tokenizer abc": "--train-tokenizer abc: … integer … see atlas prepare",
        "--input river.txt --val-fraction 2": "--val-fraction 2: … 0.99",
    },
    "pipeline": {
        "--yes": "archive.zip: does not exist … --data FOLDER_OR_FILE … --demo … https://www.kaggle.com",
        "--data river.txt --config smal.yaml": "smal.yaml: no such config file; did you mean small.yaml?",
        "--data own --config small.yaml --set zebra=red": "zebra … docs/CONFIG.md",
    },
    "plan": {
        "--config smal.yaml": "smal.yaml: no such config file; did you mean small.yaml?",
        "--config indivisible.yaml": "num_heads 3 … use hidden_size 12 or 18, or a num_heads that divides 16",
        "--config small.yaml --memory much": "--memory much: is not a size; write it as 8GB",
        "--gpu abacus": "--gpu abacus: is not a known card; give the card's memory … RTX 3060",
        "--gpu 'RTX 306O'": "--gpu RTX 306O: is not a known card; did you mean RTX 3060 … --memory",
        "--gpu 'RTX 3060 8GB'": "RTX 3060 8GB … that card has 12 GB; leave the size out … --memory",
        "--gpu T4 --set training.precision=bf16": "bf16: the T4 does not compute in bf16; use fp16 or auto",
        "--data missing": "--data missing: is not a prepared dataset; make one with atlas prepare",
        "--data river.txt": "--data river.txt: is not a prepared dataset; make one with atlas prepare",
        "--data nothing": "--data nothing: is not a prepared dataset; make one with atlas prepare",
        "--data bad_ids": "bad_ids … token id … 300 tokens; prepare the dataset again",
        "--data own --config vocabulary.yaml": "vocab_size: 50257 … own has 300 tokens: remove vocab_size",
        "--data own --gpu T4 --set model.max_seq_len=99999": "own … too few … smaller model.max_seq_len",
    },
    "doctor": {
        "--device tpu": "device: tpu: is not one of auto, cpu, cuda, cuda:N, mps",
    },
    "": {
        "bogus": "'bogus'; see atlas --help",
    },
}

MISTAKE_LINES = [
    pytest.param(f"{command} {rest}", says, id=f"{command} {rest}")
    for command, mistakes in MISTAKES.items()
    for rest, says in mistakes.items()
]


def assert_one_line(errors: str, expected: str) -> None:
    assert errors.startswith("error: ")
    assert errors.endswith("\n")
    assert errors.count("\n") == 1, errors
    pattern = ".*".join(re.escape(words) for words in expected.split(" … "))
    assert re.search(pattern, errors.replace("\\", "/")), errors


def snapshot(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Size and time of every file, and all folders, so an empty one that is left behind is seen."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def refuses(command: str, expected: str, workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`command` prints `expected` and exits with 2. The folder and its parent stay as they were."""
    before = snapshot(workshop.parent)
    code = main(shlex.split(command))
    output, errors = capsys.readouterr()
    assert_one_line(errors, expected)
    assert code == 2
    assert output == ""
    assert snapshot(workshop.parent) == before


@pytest.mark.parametrize(("command", "expected"), MISTAKE_LINES)
def test_a_mistake_is_one_line_and_changes_nothing(
    command: str,
    expected: str,
    workshop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workshop)
    refuses(command, expected, workshop, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "train --train-data own --output-dir new --config cuda.yaml",
        "train --train-data own --config small.yaml --device cuda",
        "generate --prompt Once --device cuda",
        "doctor --device cuda",
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(
    command: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    refuses(command, "device: cuda … --device cpu", workshop, capsys)


def test_the_code_in_the_pickles_would_run_if_anything_ran_it(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the refusals above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("bomb.pt", "pickled.pt"):
        with open(workshop / "broken" / name, "rb") as file:
            if name == "bomb.pt":
                torch.load(file, weights_only=False)["model_state_dict"].close()
            else:
                pickle.load(file).close()  # noqa: S301
        assert (tmp_path / "exploded").exists()
        (tmp_path / "exploded").unlink()


def test_a_line_stays_one_line_whatever_the_names_hold(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    refuses(
        "generate --prompt Once --checkpoint 'two\nlines.pt'",
        "two … lines.pt: no such checkpoint",
        workshop,
        capsys,
    )


def test_a_real_process_prints_the_same(workshop: Path) -> None:
    script = ROOT / "scripts" / "infer.py"
    done = subprocess.run(
        [sys.executable, script, "--prompt", "Once", "--checkpoint", "nowhere.pt"],
        cwd=workshop / "nothing",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert_one_line(done.stderr, "nowhere.pt: no such checkpoint; train a model first")
    assert (done.returncode, done.stdout) == (2, "")


# Errors that no room expected, at the last net in `main`

LONG = "x" * 300  # a name may have 255 bytes


WRITERS = [
    "prepare --input river.txt --output URL",
    "train --config small.yaml --train-data own --output-dir URL",
    "train --config small.yaml --train-data own --set checkpoint.output_dir=URL",
    "train --config small.yaml --train-data own --output-dir URL --profile",
    "generate --prompt Once --output-file URL",
    "report checkpoints --output URL.html",
    "report checkpoints --output new.html --png URL.png",
    "export --output URL",
    "import nothing --output-dir URL",
    "info checkpoints/atlas_best.pt --consolidate URL.pt",
    "info own --plot URL.png",
    "doctor --output-dir URL",
    "pipeline --demo --output-dir URL",
]


@pytest.mark.parametrize("command", WRITERS)
def test_a_url_is_no_place_to_write_to(
    command: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    for url in ("s3://bucket/run", "file:///data/run"):
        expected = f"{url} … is a URL, and Atlas writes only to the file system: give a path"
        refuses(command.replace("URL", url), expected, workshop, capsys)


def test_the_list_of_writers_is_complete() -> None:
    """An option whose name or help says that it names an output."""
    known = {(words[0], word) for words in map(str.split, WRITERS) for word in words if word.startswith("--")}
    for name in COMMANDS:
        app = get_command(_build_app(name)).commands[name]  # type: ignore[attr-defined]
        for option in app.params:
            flag = option.opts[0]
            if flag.startswith("--output") or re.match(
                "Also draw|Draw|Convert", getattr(option, "help", "") or ""
            ):
                assert (name, flag) in known


@pytest.mark.parametrize(
    "place", ["C:/data", "C:\\data", "a:b", "./s3:/bucket", "/data/s3://bucket", "run 1: x/y"]
)
def test_a_path_with_a_colon_is_no_url(place: str) -> None:
    assert local_path("--output", place) == Path(place)


@pytest.mark.parametrize(
    "place", ["s3://bucket", Path("s3://bucket"), "file:/data", "abfs+https://x", "gs:\\bucket"]
)
def test_a_url_that_was_a_path_is_a_url(place: str | Path) -> None:
    with pytest.raises(AtlasError, match="is a URL"):
        local_path("--output", place)


@pytest.mark.parametrize(
    "command",
    [
        "train --train-data own --config LONG",
        "train --config small.yaml --train-data LONG",
        "train --config small.yaml --train-data own --output-dir LONG",
        "train --config small.yaml --train-data own --resume LONG",
        "generate --prompt Once --checkpoint LONG",
        "export --checkpoint LONG",
        "evaluate --data own --checkpoint LONG",
        "prepare --input LONG",
        "prepare --input river.txt --output LONG",
        "prepare --input river.txt --tokenizer LONG",
        "plan --config LONG",
        "info LONG",
        "report LONG",
        "import LONG",
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="there a path may be this long")
def test_a_name_that_is_too_long_is_one_line(
    command: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    refuses(command.replace("LONG", LONG), "xxx: File name too long … check", workshop, capsys)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train --train-data own --config deep.json", "deep.json line 1: nested deeper than 20 levels"),
        (
            "prepare --input deep.jsonl --output new",
            "deep.jsonl line 1: is not JSON … must be one JSON object",
        ),
        ("prepare --input river.txt --tokenizer deep.json", "deep.json: is not a tokenizer.json … give gpt2"),
        ("info deep.json", "deep.json: is not a tokenizer.json … give gpt2"),
        ("prepare --input river.txt --tokenizer net:nested", "nested too deeply … check the files"),
        (
            "prepare --input river.txt --tokenizer net:huge",
            "out of memory (in atlas/tokenizer/load.py): Unable to allocate 8.00 PiB … with more memory",
        ),
    ],
)
def test_too_deep_or_too_large_is_one_line(
    command: str,
    expected: str,
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """JSON of 100,000 brackets where Atlas expects it; a parser's recursion and an allocation where it does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(workshop / "own", "own")
    shutil.copy(workshop / "river.txt", ".")
    nested = "[" * 100_000 + "]" * 100_000
    Path("deep.json").write_text(nested, encoding="utf-8")
    Path("deep.jsonl").write_text(f'{{"text": {nested}}}\n', encoding="utf-8")
    Path("net.py").write_text(
        "import json, numpy\n"
        "def nested(): return json.load(open('deep.json'))\n"
        "def huge(): return numpy.empty(2**50)\n",
        encoding="utf-8",
    )
    assert main(shlex.split(command)) == 2
    output, errors = capsys.readouterr()
    assert_one_line(errors, expected)
    assert output == ""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading the first byte of a process's memory gives EIO, as a broken disk does, without a file name."""
    monkeypatch.chdir(tmp_path)
    Path("broken.txt").symlink_to("/proc/self/mem")
    assert main(["prepare", "--input", "broken.txt", "--output", "new"]) == 2
    assert_one_line(capsys.readouterr().err, "broken.txt: cannot be read: Input/output error; check the file")
    assert not Path("new").exists()
    with pytest.raises(OSError, match="Input/output error") as caught:
        sha256_of(Path("broken.txt"))
    line = explain(caught.value)
    assert line is not None
    assert_one_line(f"error: {line}\n", "broken.txt: Input/output error (in atlas/files.py); check the path")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit to the size of files")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A file system that takes no more than 100 KB in a file, as a full one; nothing is left behind."""
    text = " ".join(f"word{n}" for n in range(60_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from atlas.cli import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "prepare", "--input", "long.txt", "--output", "new"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ATLAS_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert_one_line(done.stderr, "new: File too large; check its permissions and the free space")
    assert done.returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "long.txt"]


def test_a_bug_still_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Atlas recursing without end, a file of the package that is missing, an error that no file caused."""
    source = Path(atlas.errors.__file__)
    scope: dict[str, Callable[[], None]] = {}
    exec(compile("def recurse(): recurse()", str(source), "exec"), scope)  # as if it stood there
    with pytest.raises(RecursionError) as caught:
        scope["recurse"]()
    assert explain(caught.value) is None
    assert (
        explain(FileNotFoundError(errno.ENOENT, "No such file", str(source.parent / "missing.bpe"))) is None
    )
    assert explain(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert explain(ValueError("too large")) is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atlas.cli.info.info", lambda: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["info"])
