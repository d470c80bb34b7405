"""Atlas in a notebook: `atlas.load` beside the command line and transformers, and the tour in docs/notebooks."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import typing
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import atlas
from atlas.cli import main
from atlas.config.loader import read_yaml, resolve
from atlas.data import open_dataset
from atlas.errors import AtlasError
from atlas.inference import LoadedModel, look
from tests.conftest import corpus
from tests.runs import layer, trained
from tests.test_docs import flags_of
from tests.test_model import difference, transformers_twin

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs/notebooks/tour.ipynb"

# Loading, generating and inspecting


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on text, with a vocabulary trained on it."""
    folder = tmp_path_factory.mktemp("river")
    (folder / "river.txt").write_text(corpus(), encoding="utf-8")
    prepared = ["prepare", "--input", str(folder / "river.txt"), "--output", str(folder / "data")]
    assert main([*prepared, "--train-tokenizer", "300"]) == 0
    explicit = layer(folder / "run", folder / "data", model__max_seq_len=32, training__max_steps=20)
    del explicit["data"]["tokenizer"]
    trained(explicit)
    return folder / "run" / "atlas_best.pt"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on conversations, one id per byte: too few updates for sensible answers."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [json.dumps({"prompt": f"colour {n}?", "response": f"blue {n}."}) for n in range(30)]
    (folder / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    trained(layer(folder / "run", folder / "chats.jsonl", model__max_seq_len=64))
    return folder / "run" / "atlas_best.pt"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return atlas.load(str(checkpoint), device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "max_tokens": 70},  # longer than the context of 32
        {"temperature": 0, "max_tokens": 12},
        {"min_p": 0.05, "repetition_penalty": 1.2, "stop": ["the", "a b"]},
    ],
)
@pytest.mark.parametrize("prompt", ["The river", ""])
def test_text_equals_that_of_the_command(
    checkpoint: Path, settings: dict[str, Any], prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = []
    for name, value in settings.items():
        for each in value if isinstance(value, list) else [value]:
            words += ["--" + name.replace("_", "-"), str(each)]
    command = ["generate", "--checkpoint", str(checkpoint), "--prompt", prompt, "--seed", "7", *words]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    loaded = atlas.load(str(checkpoint))
    assert loaded.generate(prompt, seed=7, **settings) + "\n" == said
    assert len(said) > len(prompt) + 1


def test_a_chat_answer_equals_that_of_the_command(
    chatty: Path, model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = ["--tokenizer", "tests.toy:tokenizer"]
    command = [
        "generate",
        "--chat",
        "--checkpoint",
        str(chatty),
        *toy,
        "--prompt",
        "colour 3?",
        "--seed",
        "2",
    ]
    capsys.readouterr()
    assert main(command) == 0
    loaded = atlas.load(str(chatty), tokenizer="tests.toy:tokenizer")
    answer = loaded.generate("colour 3?", seed=2, chat=True)
    assert answer + "\n" == capsys.readouterr().out
    assert answer != loaded.generate("colour 3?", seed=2).removeprefix("colour 3?")
    with pytest.raises(AtlasError, match="was not trained on conversations"):
        model.generate("colour 3?", chat=True)


def test_without_a_seed_texts_differ(model: LoadedModel) -> None:
    assert len({model.generate("The river", temperature=2, top_k=0, top_p=1) for _ in range(3)}) == 3


def test_stop_may_be_a_single_string(model: LoadedModel) -> None:
    full = model.generate("The river", seed=3)
    stop = full[len("The river") :][20:25]
    assert model.generate("The river", seed=3, stop=stop) == full[: full.index(stop, len("The river"))]


def test_text_follows_a_change_of_the_weights_and_leaves_the_model_as_it_is(checkpoint: Path) -> None:
    loaded = atlas.load(str(checkpoint), device="cpu")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    text = loaded.generate("The river", temperature=0)
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad():
        for block in loaded.model.blocks:
            block.mlp.down.weight.zero_()
    changed = loaded.generate("The river", temperature=0)
    assert changed != text
    ids = loaded.tokenizer.encode("The river")
    for _ in range(8):
        ids.append(int(loaded.logits(ids)[-1].argmax()))
    assert changed.startswith(loaded.tokenizer.decode(ids))


def test_logits_equal_those_of_transformers_gpt2(model: LoadedModel) -> None:
    twin = transformers_twin(model.model)
    text = "The river runs past the old mill"
    ids = model.tokenizer.encode(text)
    with torch.no_grad():
        theirs = twin(input_ids=torch.tensor([ids])).logits[0]
    logits = model.logits(text)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(ids), model.tokenizer.vocab_size)
    assert difference(logits, theirs) < 1e-5
    assert torch.equal(model.logits(ids), logits)
    assert torch.equal(model.logits(torch.tensor(ids)), logits)  # type: ignore[arg-type]
    assert torch.equal(model.logits(""), model.logits([model.tokenizer.eos_id]))
    logits[0, 0] = -math.inf  # the caller may change it


def test_logits_in_half_precision_are_returned_in_fp32(model: LoadedModel) -> None:
    half = dataclasses.replace(model, model=copy.deepcopy(model.model).half()).logits("The river")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.logits("The river"), atol=0.02, rtol=0.02)
    assert not torch.equal(half, model.logits("The river"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1] * 33, r"33 tokens: the model's context is 32; .*\[-32:\]"),
        ([], "at least one"),
        ([5, 300], "id 300: .* 0 to 299"),
        ([-1], "id -1: .* 0 to 299"),
    ],
)
def test_invalid_ids_are_refused(model: LoadedModel, given: list[int], said: str) -> None:
    with pytest.raises(AtlasError, match=said):
        model.logits(given)
    assert model.logits([1] * 32).shape == (32, 300)


def test_a_missing_file_and_settings_without_meaning_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"nowhere\.pt"):
        atlas.load(str(tmp_path / "nowhere.pt"))
    with pytest.raises(AtlasError, match="max-tokens 0"):
        model.generate("The river", max_tokens=0)
    with pytest.raises(AtlasError, match="temperature -1"):
        model.generate("The river", temperature=-1)


def test_repr_describes_the_model(checkpoint: Path, model: LoadedModel) -> None:
    said = repr(model)
    card = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in model.model.parameters())
    parameters -= 16 * (model.model.token_embedding.num_embeddings - 300)  # rows that pad the vocabulary
    for fact in (
        str(checkpoint),
        f"{parameters:,} parameters",
        "2 layers × 16 × 2 heads",
        "context 32",
        "float32 on cpu",
        f"step {card['step']} of 20",
        f"loss {card['loss']:.4f}",
        "tokenizer bpe, 300 tokens",
    ):
        assert fact in said
    assert max(map(len, said.replace(str(checkpoint), "").splitlines())) < 80


def test_import_atlas_loads_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import atlas\n"
        "new = {m.split('.')[0] for m in {*sys.modules} - before}\n"
        "print(callable(atlas.load), sorted(m for m in new if m not in sys.stdlib_module_names))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == ["True", "['atlas']\n"]


def test_load_is_typed() -> None:
    hints = typing.get_type_hints(atlas.load, {**vars(atlas), "LoadedModel": LoadedModel})
    assert hints["return"] is LoadedModel


# The tour


@cache
def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


@cache
def code() -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells("code"))


def test_the_tour_is_committed_without_outputs() -> None:
    assert len(cells("code")) > 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert [cell["id"] for cell in cells("code") if cell["metadata"]] == []


def test_what_the_tour_imports_and_calls_exists() -> None:
    """So that a renamed function is found without the slow test, which takes a minute."""
    tree = ast.parse(code())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imported
    for node in imported:
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)
        else:
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"load", "generate", "logits"} <= used


def test_the_tours_commands_and_settings_exist(tmp_path: Path) -> None:
    commands = re.findall(r'run\("atlas (.*?)"\)', code())
    assert [command.split()[0] for command in commands] == ["prepare", "train", "export"]
    for command, *words in map(shlex.split, commands):
        assert {word for word in words if word.startswith("--")} <= flags_of(command)
    [config] = re.findall(r'"""\\\n(model:.*?)"""', code(), re.S)
    (tmp_path / "tour.yaml").write_text(config, encoding="utf-8")
    resolve(read_yaml(tmp_path / "tour.yaml"))


@pytest.mark.slow
def test_the_tour_leads_from_text_to_a_model_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as in Jupyter. Then other programs read its files, and the model must agree with its text."""
    import nbclient
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()

    [folder] = tmp_path.glob("atlas-tour-*")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    said = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in said
    assert "Warning" not in said
    assert "\x1b" not in said  # no colours, no progress bars

    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    text = (folder / "river.txt").read_text(encoding="utf-8")
    # Each sentence is drawn from 32: no loss can be below the entropy of that, which counting finds too.
    counts = Counter(text.splitlines()).values()
    nats = -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)
    train = open_dataset(folder / "data").split("train")
    assert train is not None
    tokens = train.num_tokens / (0.95 * sum(counts))
    assert losses[0] > 4
    assert 0.9 < losses[-1] / (nats / tokens) < 1.2

    model = atlas.load(str(folder / "run/atlas_best.pt"), device="cpu")
    # Its prose says that words of the text are one token each, and a word that is not in it is several.
    for line in (text.splitlines()[0], "At dawn the heron stands in the reeds."):
        assert len(model.tokenizer.encode(line)) == len(line.split()) + 1  # the full stop
    assert len(model.tokenizer.encode(" dragon")) > 2
    assert f"among {model.tokenizer.vocab_size} tokens" in TOUR.read_text(encoding="utf-8")
    for line in model.generate("At dawn", seed=5, max_tokens=60).splitlines()[:-1]:
        assert f"{line}\n" in text  # every kind of sentence is there many times
    beginning = "At noon the heron stands in the"
    before = f".\n{beginning}"  # the full stop and the line end are one token
    logprobs = model.logits(f"{before} reeds").log_softmax(-1)
    ids = model.tokenizer.encode(f"{before} reeds")
    after = len(model.tokenizer.encode(before))
    chance = math.exp(sum(float(logprobs[t - 1, ids[t]]) for t in range(after, len(ids))))
    assert chance == pytest.approx(text.count("stands in the reeds") / text.count("stands in the"), abs=0.15)

    # The heads look back at the verb more than at its subject.
    ids = model.tokenizer.encode(beginning)
    heron, stands = (ids.index(model.tokenizer.encode(word)[0]) for word in (" heron", " stands"))
    last = look.attention(model, ids)[:, :, -1]
    assert (last[..., stands] > last[..., heron]).float().mean() > 0.5

    reader = gguf.GGUFReader(folder / "river.gguf")
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    ours = model.model.token_embedding.weight[: model.tokenizer.vocab_size].detach().numpy()
    assert (table.data == ours).all()
