"""Conversations: the template against transformers' and llama.cpp's, the targets, and models that answer."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.cli import main
from atlas.config import AtlasConfig
from atlas.config.loader import nested, overlay, resolve
from atlas.data import ResolvedData, validation_sequences
from atlas.data.sequences.conversations import ChatDataset, Conversations, read_conversations
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.data.sequences.mixture import MixtureDataset
from atlas.data.text.formats.chats import ChatReport, read_conversation
from atlas.errors import AtlasError
from atlas.export.huggingface import export_hf
from atlas.export.save_imported import save_imported
from atlas.inference.load import load_model
from atlas.model import AtlasLM, merged
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.tokenizer.chat import CHAT_TEMPLATE, Message, encode_chat, newest_that_fit
from atlas.tokenizer.load import with_chat_template
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.loss import linear_cross_entropy
from atlas.training.resume import Request, choose_start
from tests.conftest import corpus
from tests.export.test_export import MODERN, sharp_model
from tests.runs import layer, logged, trained

COLOURS = {"sky": "blue", "grass": "green", "sun": "yellow", "snow": "white", "coal": "black"}
TALK = [
    Message("system", "Be brief, and say <|endoftext|> and <|user|> aloud."),
    Message("user", "  What colour is the sky?\n"),
    Message("assistant", "Blue.\n\nMostly."),
    Message("user", "And l'été, à midi 🙂?"),
    Message("assistant", "\n Yellow "),
]


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus(), *map(" ".join, COLOURS.items())], 320)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_rows(talks: list[list[Message]]) -> list[dict]:
    return [{"messages": [message._asdict() for message in talk]} for talk in talks]


def pairs(count: int) -> list[dict]:
    """Made-up questions with one answer each; the fifth kind asks for longer than a context."""
    things = list(COLOURS)
    rows = []
    for number in range(count):
        thing = things[number % len(things)]
        filler = "please " * (40 if number % 20 == 7 else number % 3)
        rows.append({"prompt": f"{filler}colour of {thing}?", "response": f"{COLOURS[thing]} {thing}."})
    rows[3]["response"] = "blue " * 60 + "."
    return rows


def said_in(conversations: Conversations, tokenizer: Tokenizer) -> list[str]:
    """The runs of target tokens, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], conversations.is_answer, [0]])))
    return [
        tokenizer.decode(conversations.tokens[a:b].tolist())
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


# The template


def test_ids_are_those_of_the_template_in_transformers(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    from transformers import AutoTokenizer

    export_hf(sharp_model(bpe), bpe, tmp_path / "hf", chat_template=CHAT_TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    # In a text, end of text is a token there and not here: it is left out of what both are given.
    talk = [Message(role, content.replace("<|endoftext|>", "it")) for role, content, _ in TALK]
    as_dicts = [message._asdict() for message in talk]
    rendered = theirs.apply_chat_template(as_dicts[:-1], tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|endoftext|>\n<|assistant|>\n")
    assert encode_chat(talk[:-1], bpe) == theirs(rendered).input_ids
    whole = theirs.apply_chat_template(as_dicts, tokenize=True)["input_ids"]
    read, *_ = read_conversations(write_rows(tmp_path / "c.jsonl", as_rows([talk])), bpe, val_fraction=0)
    assert [*read.tokens.tolist(), *bpe.encode("\n")] == whole


def test_the_model_card_shows_how_to_prompt(
    tmp_path: Path, bpe: ByteLevelTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    card = export_hf(sharp_model(bpe), bpe, tmp_path / "hf", chat_template=CHAT_TEMPLATE) / "README.md"
    [code] = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "hf")).replace("=100", "=3")
    exec(compile(code, "card", "exec"), {})
    asked = bpe.decode(encode_chat([Message("user", "What colour is the sky?")], bpe))
    assert asked in capfd.readouterr().out


@pytest.mark.slow
def test_the_command_of_the_readme_teaches_fifty_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On top of the demo's model, trained for a short while, and the checkpoint that the README names."""
    monkeypatch.chdir(tmp_path)
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    assert main(["prepare", "--input", "river.txt", "--train-tokenizer", "400", "--output", "data"]) == 0
    shorter = [
        "--max-steps",
        "40",
        "--device",
        "cpu",
        "--set",
        "model.hidden_size=64",
        "--set",
        "tracking.samples=0",
    ]
    assert main(["train", "--config", "modern-nano", "--train-data", "data", *shorter]) == 0
    colours = list(COLOURS.values())
    answers = {
        f"What is in box {n}?": f"A {colours[n % 5]} {word}." for n, word in enumerate(corpus().split()[:50])
    }
    write_rows(Path("chats.jsonl"), [{"prompt": q, "response": a} for q, a in answers.items()])
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    [train] = re.findall(r"^atlas (train --init-from .*)$", page, re.M)
    [ask] = re.findall(r"^atlas (generate --chat .*)$", page, re.M)
    assert main(shlex.split(train)) == 0
    assert "50 conversations to train on, 0 held out" in capfd.readouterr().err
    words = shlex.split(ask)
    place = words.index("--prompt")
    Path("questions.txt").write_text("\n".join(answers), encoding="utf-8")
    words[place : place + 2] = ["--prompts-file", "questions.txt", "--output-file", "answers.jsonl"]
    assert main(words) == 0
    said = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    right = sum(row["text"].strip() == answers[row["prompt"]] for row in said)
    assert len(said) == 50
    assert right > 25
    # The best checkpoint is no worse than the last one.
    steps = {path.stem: load_checkpoint(path)["step"] for path in Path("checkpoints/chat").glob("atlas_*.pt")}
    assert steps["atlas_best"] == max(steps.values())


def test_answers_and_their_ends_are_the_only_targets(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    path = write_rows(tmp_path / "c.jsonl", [*as_rows([TALK]), {"prompt": "a", "response": "b"}])
    read, val, notes = read_conversations(path, bpe, val_fraction=0.05)
    assert val is None
    assert "0 held out (fewer than 20 are too few to choose a checkpoint by" in notes[0]
    assert sum(part is not None for part in read_conversations(path, bpe, val_fraction=0.5)[:2]) == 2
    assert said_in(read, bpe) == [f"{text}<|endoftext|>" for text in ("Blue.\n\nMostly.", "Yellow", "b")]
    assert read.answer_bytes == len("Blue.\n\nMostly.Yellowb")
    assert bpe.eos_id not in bpe.encode(TALK[0].content)
    assert int((read.tokens == bpe.eos_id).sum()) == len(TALK) + 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x"}, "is no conversation (fields: prompt)"),
        ({"prompt": {}, "response": "y"}, "is not text"),
        ({"other": 1}, "is no conversation (fields: other)"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no answer"),
        ({"messages": []}, "is no conversation"),
        ({"messages": "x"}, "is neither a list nor JSON"),
        ({"messages": ["x"]}, "message 1: is not an object"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: has no text in content"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "has the role 'narrator'; Atlas knows ai, assistant",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "contains 'image_url'"),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
            "has no answer to learn: each is marked with weight 0",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row: dict, said: str) -> None:
    with pytest.raises(AtlasError, match=r"^c\.jsonl line 7") as refusal:
        read_conversation(row, "c.jsonl line 7", ChatReport())
    assert said in str(refusal.value)


def test_a_row_without_an_answer_ends_the_command_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}])
    assert main(["train", "--train-data", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert f"{path} line 2: is no conversation (fields: prompt)" in line
    assert not (tmp_path / "out").exists()
    assert main(["prepare", "--input", str(path), "--output", str(tmp_path / "p")]) == 2
    assert "its rows are conversations, which atlas prepare does not support" in capfd.readouterr().err
    assert main(["plan", "--config", "nano", "--data", str(path)]) == 2
    assert "holds conversations" in capfd.readouterr().err


def test_packed_files_windows_line_ends_and_bytes_that_are_not_utf8(
    tmp_path: Path, bpe: ByteLevelTokenizer
) -> None:
    path = tmp_path / "c.jsonl.gz"
    lines = [b'{"prompt": "a", "response": "caf\xe9"}', b"", b'{"prompt": "a\\u0000", "response": "b"}']
    path.write_bytes(gzip.compress(b"\r\n".join(lines)))
    read, _, notes = read_conversations(path, bpe, val_fraction=0)
    assert said_in(read, bpe) == ["caf\ufffd<|endoftext|>", "b<|endoftext|>"]
    assert "1 byte replaced by U+FFFD" in "\n".join(notes)


def test_held_out_conversations_that_are_too_long_are_ignored(
    tmp_path: Path, bpe: ByteLevelTokenizer
) -> None:
    short, long = (
        read_conversations(
            write_rows(tmp_path / "c.jsonl", [{"prompt": prompt, "response": "b"}]), bpe, val_fraction=0
        )[0]
        for prompt in ("a", "a " * 200)
    )
    config = resolve({"model": {"max_seq_len": 32}})
    data = ResolvedData((short,), (1.0,), (long,), bpe, "", [])
    assert validation_sequences(data, config) is None
    asked_for = dataclasses.replace(data, vals=(dataclasses.replace(long, name="other.jsonl"),))
    with pytest.raises(AtlasError, match=r"other\.jsonl: no answer begins"):
        validation_sequences(asked_for, config)


def test_bits_per_byte_of_a_mixture_count_what_is_predicted(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    rows = [{"prompt": "colour " * 20, "response": "blue"}]
    chats = ChatDataset(
        read_conversations(write_rows(tmp_path / "c.jsonl", rows), bpe, val_fraction=0)[0], 200
    )
    assert chats.num_targets == len(bpe.encode("blue")) + 1 < chats.num_tokens
    assert chats.bytes_per_token == 4 / chats.num_targets
    both = MixtureDataset([chats, chats], [1.0, 3.0])
    assert both.bytes_per_token == pytest.approx(chats.bytes_per_token)


def test_a_dialogue_keeps_its_newest_complete_messages(bpe: ByteLevelTokenizer) -> None:
    talk = [Message("user", "colour of sky?"), Message("assistant", "blue")] * 3 + [
        Message("user", "of snow?")
    ]
    for room in range(200):
        kept = newest_that_fit(talk, lambda rest: len(encode_chat(rest, bpe)) <= room)  # noqa: B023
        assert kept == talk[len(talk) - len(kept) :]
        assert kept[0].role == "user"
        assert len(kept) == 1 or len(encode_chat(kept, bpe)) <= room
        longer = talk[len(talk) - len(kept) - 2 :] if len(kept) < len(talk) else None
        assert longer is None or len(encode_chat(longer, bpe)) > room
    assert newest_that_fit(talk, lambda _: True) == talk
    system = Message("system", "Be brief.")
    assert newest_that_fit([system, *talk], lambda rest: len(rest) <= 4) == [system, *talk[-3:]]
    assert newest_that_fit([system, *talk], lambda _: False) == [system, talk[-1]]
    assert newest_that_fit([system], lambda _: False) == [system]
    assert newest_that_fit(talk[1:], lambda _: True) == talk[1:]


# The windows


@st.composite
def conversations(draw: st.DrawFn) -> Conversations:
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=12))
    total = sum(lengths)
    is_answer = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    ends = np.cumsum(lengths)
    is_answer[np.concatenate([[0], ends[:-1]])] = False  # a role's name is nobody's answer
    return Conversations("c", np.arange(1, total + 1, dtype=np.uint32), is_answer, ends, 7, 0)


@settings(deadline=None)
@given(conversations(), st.integers(4, 40))
def test_every_answer_within_reach_is_a_target_once_beside_its_own_past(chats: Conversations, T: int) -> None:
    starts = np.concatenate([[0], chats.ends[:-1]])
    reachable = {
        int(chats.tokens[place])
        for start, end in zip(starts, chats.ends, strict=True)
        for place in range(start, min(end, start + T + 1))
        if chats.is_answer[place]
    }
    if not reachable:
        with pytest.raises(AtlasError, match="no answer begins"):
            ChatDataset(chats, T)
        return
    dataset = ChatDataset(chats, T, with_documents=True)
    targets = []
    for window in range(len(dataset)):
        inputs, goals, numbers = (column.tolist() for column in dataset[window])
        assert len(inputs) == len(goals) == len(numbers) == T
        for place, goal in enumerate(goals):
            if goal == IGNORE_INDEX:
                continue
            targets.append(goal)
            assert inputs[place] == goal - 1
            # Back to the conversation's first token, all that stands before it, and all of one number.
            begin = int(starts[np.searchsorted(chats.ends, goal - 1, side="right")]) + 1
            past = list(range(begin, goal))
            assert inputs[place + 1 - len(past) : place + 1] == past
            assert {numbers[p] for p in range(place + 1 - len(past), place + 1)} == {numbers[place]}
            assert place + 1 == len(past) or numbers[place - len(past)] != numbers[place]
    assert sorted(targets) == sorted(reachable)


def test_a_packed_conversation_has_the_loss_it_has_alone(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    talks = [TALK, TALK[1:3], [Message("user", "colour?"), Message("assistant", "green")]]
    read, *_ = read_conversations(write_rows(tmp_path / "c.jsonl", as_rows(talks)), bpe, val_fraction=0)
    model = sharp_model(bpe, max_seq_len=400)
    [packed] = ChatDataset(read, 400, with_documents=True)
    expected = 0.0
    for start, end in zip([0, *read.ends[:-1]], read.ends, strict=True):
        ids = torch.from_numpy(read.tokens[start:end].astype(np.int64))
        costs = F.cross_entropy(model(ids[None, :-1])[0].detach(), ids[1:], reduction="none")
        expected += float(costs[torch.from_numpy(read.is_answer[start + 1 : end])].sum())
    inputs, targets, numbers = (column[None] for column in packed)
    hidden = model.hidden_states(inputs, documents=numbers).detach().requires_grad_()
    loss = linear_cross_entropy(hidden, model.head_weight, targets)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)

    loss.backward()
    learns = hidden.grad[0].abs().sum(1) > 0
    assert torch.equal(learns, targets[0] != IGNORE_INDEX)
    assert 0 < int(learns.sum()) < len(learns)


# Runs


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, bpe: ByteLevelTokenizer) -> Path:
    """A folder: made-up pairs, a model that was trained on them, and one with a LoRA on top."""
    folder = tmp_path_factory.mktemp("tuned")
    bpe.save(folder / "bpe.json")
    rows = pairs(200)
    write_rows(folder / "pairs.jsonl", rows)
    explicit = layer(
        folder / "whole",
        folder / "pairs.jsonl",
        data__tokenizer=str(folder / "bpe.json"),
        data__val_fraction=0.1,
        model={"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 128, "dropout": 0.0},
        training__max_steps=120,
        training__batch_size=8,
        training__learning_rate=1e-2,
        training__log_interval=5,
    )
    _, result = trained(explicit)
    assert result.outcome == "finished"
    more = layer(folder / "lora", folder / "pairs.jsonl", lora__rank=4, training__learning_rate=1e-3)
    del more["model"], more["data"]["tokenizer"]
    trained(more, init_from=str(folder / "whole" / "atlas_best.pt"))
    return folder


def test_two_hundred_pairs_some_longer_than_the_context(tuned: Path) -> None:
    lines = logged(tuned / "whole")
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert lines[-1]["loss"] < 0.5 < 2 < lines[0]["loss"]
    assert logged(tuned / "whole", "validation")
    log = (tuned / "whole" / "training.log").read_text()
    assert "the loss counts only the answers" in log
    assert "longer than 128 tokens: 1 conversations lose their end, " in log
    assert "document_mask: true" in log
    for name in ("whole", "lora"):
        contents = load_checkpoint(tuned / name / "atlas_best.pt")
        assert contents["config"]["data"]["document_mask"] is True
        assert contents["data"]["chat_form"] == "zephyr"


def test_conversations_without_an_answer_within_reach_are_refused(tmp_path: Path, tuned: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "colour " * 200, "response": "blue"}])
    explicit = layer(tmp_path / "out", long, data__tokenizer=str(tuned / "bpe.json"))
    with pytest.raises(AtlasError, match="no answer begins within max_seq_len 16"):
        trained(explicit)


def test_lora_merged_and_in_peft_says_the_same(tmp_path: Path, tuned: Path, bpe: ByteLevelTokenizer) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    contents = load_checkpoint(tuned / "lora" / "atlas_best.pt")
    config = resolve(contents["config"])
    loaded = load_model(tuned / "lora" / "atlas_best.pt")
    tokens = torch.tensor([encode_chat([Message("user", "colour of snow?")], bpe)])
    unmerged = loaded.model(tokens)
    assert not torch.equal(load_model(tuned / "whole" / "atlas_best.pt").model(tokens), unmerged)
    alone = AtlasLM(config.model).eval()
    alone.load_state_dict(merged(contents["model_state_dict"], config.lora))
    assert float((alone(tokens) - unmerged).detach().abs().max()) < 1e-5

    for checkpoint, form in (("whole", "hf"), ("lora", "peft")):
        source = tuned / checkpoint / "atlas_best.pt"
        command = ["export", "--format", form, "--checkpoint", str(source), "--output", str(tmp_path / form)]
        assert main(command) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert float((theirs(tokens).logits[..., : bpe.vocab_size] - unmerged).detach().abs().max()) < 1e-4


def test_an_exported_model_answers_in_llama_cpps_chat_endpoint_as_in_atlas(
    tmp_path: Path, tuned: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    source = str(tuned / "lora" / "atlas_best.pt")
    file = tmp_path / "chat.gguf"
    command = ["export", "--checkpoint", source, "--output", str(file), "--quantize", "f32", "--modelfile"]
    assert main(command) == 0
    assert "<|assistant|>\n" in (tmp_path / "Modelfile").read_text()
    capfd.readouterr()

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = 128, 1, 1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    right = 0
    for thing in COLOURS:
        question = f"colour of {thing}?"
        request = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 30}
        said = server.handle_chat_completions(request)
        said = json.loads(said) if isinstance(said, str) else said
        [choice] = said["choices"]
        options = ["--temperature", "0", "--max-tokens", "30", "--top-k", "0", "--top-p", "1"]
        assert main(["generate", "--chat", "--checkpoint", source, "--prompt", question, *options]) == 0
        assert capfd.readouterr().out == choice["message"]["content"] + "\n"
        assert choice["finish_reason"] == "stop"
        right += choice["message"]["content"] == f"{COLOURS[thing]} {thing}."
    assert right >= 3


def test_a_dialogue_has_a_system_prompt_and_can_begin_anew(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import io

    command = [
        "generate",
        "--chat",
        "--checkpoint",
        str(tuned / "whole" / "atlas_best.pt"),
        "--temperature",
        "0",
    ]
    command += ["--max-tokens", "20"]

    def said(lines: str, *options: str) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main([*command, "--interactive", *options]) == 0
        out, told = capfd.readouterr()
        return out.splitlines(), told

    plain, _ = said("colour of sky?\n")
    twice, told = said("colour of sky?\n/reset\ncolour of sky?\n")
    assert twice == plain * 2  # the second question knows nothing of the first
    assert "a new conversation" in told
    _, told = said("/help\n/system Be brief.\n/nonsense\n")
    assert "/reset" in told
    assert "/nonsense: no such command: /help lists them" in told
    assert main([*command, "--prompt", "colour of sky?", "--system", "Be brief."]) == 0
    once = capfd.readouterr().out.splitlines()
    assert said("colour of sky?\n", "--system", "Be brief.")[0] == once
    assert said("/system Be brief.\ncolour of sky?\n")[0] == once
    assert main(["generate", "--prompt", "x", "--system", "Be brief."]) == 2
    assert "--system Be brief.: only with --chat" in capfd.readouterr().err


def test_a_dialogue_remembers_and_a_text_model_refuses(
    tmp_path: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import io

    source = tuned / "whole" / "atlas_best.pt"
    monkeypatch.setattr("sys.stdin", io.StringIO("colour of sky?\n \n\ncolour of coal?\n"))
    greedy = ["--temperature", "0", "--max-tokens", "20"]
    assert main(["generate", "--chat", "--interactive", "--checkpoint", str(source), *greedy]) == 0
    first, second = capfd.readouterr().out[:-1].split("\n", 1)
    loaded = load_model(source)
    talk = [
        Message("user", "colour of sky?"),
        Message("assistant", first),
        Message("user", "colour of coal?"),
    ]
    for length, answer in ((1, first), (3, second)):
        ids = encode_chat(talk[:length], loaded.tokenizer)
        for _ in range(20):
            ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == loaded.tokenizer.eos_id:
                ids.pop()
                break
        assert loaded.tokenizer.decode(ids).endswith("<|assistant|>\n" + answer)

    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    more = layer(tmp_path / "more", tmp_path / "text.txt", training__max_steps=1)
    del more["model"], more["data"]["tokenizer"]
    trained(more, init_from=str(source))
    trained(layer(tmp_path / "text", tmp_path / "text.txt", training__max_steps=1, data__tokenizer="gpt2"))
    for folder, code in (("more", 0), ("text", 2)):  # fine-tuning on a text keeps the template
        checkpoint = str(tmp_path / folder / "atlas_best.pt")
        assert main(["generate", "--chat", "--checkpoint", checkpoint, "--prompt", "x", *greedy]) == code
    assert "was not trained on conversations" in capfd.readouterr().err


def test_evaluate_counts_answers(tmp_path: Path, tuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, some = tuned / "whole" / "atlas_best.pt", write_rows(tmp_path / "some.jsonl", pairs(6)[:3])
    assert main(["evaluate", "--checkpoint", str(source), "--data", str(some)]) == 0
    figures = dict(line.rsplit(None, 1) for line in capfd.readouterr().out.splitlines()[1:] if "  " in line)
    loaded = load_model(source)
    nats, tokens, text = 0.0, 0, ""
    for row in pairs(6)[:3]:
        question = encode_chat([Message("user", row["prompt"])], loaded.tokenizer)
        answer = [*loaded.tokenizer.encode(row["response"]), loaded.tokenizer.eos_id]
        logprobs = loaded.model(torch.tensor([question + answer]))[0].detach().log_softmax(-1)
        nats -= sum(float(logprobs[len(question) + i - 1, token]) for i, token in enumerate(answer))
        tokens, text = tokens + len(answer), text + row["response"]
    assert float(figures["bits per byte"]) == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-4)


def test_the_same_bits_after_a_stop_and_the_mask_stays_what_it_was(tmp_path: Path, tuned: Path) -> None:
    settings = {
        "data__tokenizer": str(tuned / "bpe.json"),
        "data__document_mask": False,
        "model__max_seq_len": 64,
    }
    trained(layer(tmp_path / "whole", tuned / "pairs.jsonl", checkpoint__save_interval=3, **settings))
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for path in [*parts.glob("atlas_step_6.*"), *parts.glob("atlas_best.*")]:
        path.unlink()
    run, _ = trained({"checkpoint": {"output_dir": str(parts)}}, resume=str(parts / "atlas_step_3.pt"))
    assert run.config.data.document_mask is False
    one, other = (load_checkpoint(tmp_path / name / "atlas_step_6.pt") for name in ("whole", "parts"))
    state = other["model_state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in one["model_state_dict"].items())


def test_a_mixture_with_text_trains_on_both(tmp_path: Path, tuned: Path) -> None:
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    parts = [
        {"path": str(tuned / "pairs.jsonl"), "weight": 1},
        {"path": str(tmp_path / "text.txt"), "weight": 1},
    ]
    explicit = layer(
        tmp_path / "out", tmp_path / "unused", data__mixture=parts, data__tokenizer=str(tuned / "bpe.json")
    )
    explicit["data"]["train_data"] = None
    explicit["model"]["max_seq_len"] = 64
    run, result = trained(explicit)
    assert result.outcome == "finished"
    assert run.data.train.num_tokens > 0
    assert load_checkpoint(tmp_path / "out" / "atlas_best.pt")["data"]["chat_form"]


def test_an_imported_models_own_template_is_kept_and_run(
    tmp_path: Path, bpe: ByteLevelTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    import gguf

    template = "{{ messages[0].content }}!"
    export_hf(sharp_model(bpe), bpe, tmp_path / "hf", chat_template=template)
    assert main(["import", str(tmp_path / "hf"), "--output-dir", str(tmp_path / "in")]) == 0
    file = tmp_path / "m.gguf"
    command = [
        "export",
        "--checkpoint",
        str(tmp_path / "in" / "atlas_best.pt"),
        "--output",
        str(file),
        "--no-verify",
    ]
    assert main(command) == 0
    field = gguf.GGUFReader(file).get_field("tokenizer.chat_template")
    assert field is not None
    assert field.contents() == template
    assert main([*command, "--modelfile"]) == 2
    loaded = load_model(tmp_path / "in" / "atlas_best.pt")
    assert loaded.generate("x", max_tokens=5, temperature=0, chat=True) == loaded.generate(
        "x!", max_tokens=5, temperature=0
    ).removeprefix("x!")


def test_fine_tuning_takes_its_settings_from_the_conversations(
    tmp_path: Path, bpe: ByteLevelTokenizer
) -> None:
    rope = sharp_model(bpe, **(MODERN["llama"] | {"max_seq_len": 2048}))
    base = save_imported(rope, bpe, tmp_path / "rope", source="a test")
    short = [{"prompt": f"What is in box {n}?", "response": f"The number {n}."} for n in range(60)]
    write_rows(tmp_path / "few.jsonl", short)

    def settings_of(source: Path, name: str, **given: object) -> AtlasConfig:
        explicit = nested("data.train_data", str(tmp_path / name))
        explicit["checkpoint"] = {"output_dir": str(tmp_path / "out")}
        for key, value in given.items():
            explicit = overlay(explicit, nested(key.replace("__", "."), value))
        start = choose_start(Request(explicit, init_from=str(source)))
        start.lock.release()
        return start.config

    few = settings_of(base, "few.jsonl")
    assert (few.model.max_seq_len, few.training.max_steps, few.training.epochs) == (256, 400, None)
    assert few.training.warmup_steps == 10
    # Fewer updates have a higher rate, more a lower one, and a wider model a lower one.
    rate = few.training.learning_rate
    assert settings_of(base, "few.jsonl", training__max_steps=100).training.learning_rate > 2 * rate
    assert settings_of(base, "few.jsonl", training__epochs=1000).training.learning_rate < rate
    low_rank = settings_of(base, "few.jsonl", lora__rank=4).training
    assert low_rank.learning_rate >= 2 * rate
    assert low_rank.max_steps == 800
    wide = save_imported(
        sharp_model(bpe, **(MODERN["llama"] | {"hidden_size": 256})), bpe, tmp_path / "wide", source=""
    )
    assert settings_of(wide, "few.jsonl").training.learning_rate == pytest.approx(rate / 2, rel=0.1)

    # What the user sets stays.
    asked = {"training__epochs": 2, "training__batch_size": 5, "training__learning_rate": 3e-5}
    own = settings_of(base, "few.jsonl", model__max_seq_len=64, training__warmup_steps=4, **asked)
    assert own.model.max_seq_len == 64
    assert (own.training.epochs, own.training.batch_size, own.training.max_steps) == (2, 5, None)
    assert (own.training.learning_rate, own.training.warmup_steps) == (3e-5, 4)

    # A long conversation needs a longer context, which a model that was tuned with a short one still has.
    _, result = trained(
        {
            "data": {"train_data": str(tmp_path / "few.jsonl")},
            "training": {"max_steps": 2},
            "checkpoint": {"output_dir": str(tmp_path / "tuned")},
        },
        init_from=str(base),
    )
    long = {"prompt": "Why?", "response": "Because. " * 300}
    write_rows(tmp_path / "long.jsonl", [*short, long])
    assert load_checkpoint(result.saved[-1])["config"]["model"]["max_seq_len"] == 256
    assert load_model(result.saved[-1]).config.model.max_seq_len == 2048
    assert settings_of(result.saved[-1], "long.jsonl").model.max_seq_len == 2048
    # Learned positions that are left out would be lost.
    learned = save_imported(sharp_model(bpe, max_seq_len=512), bpe, tmp_path / "learned", source="a test")
    assert settings_of(learned, "few.jsonl").model.max_seq_len == 512


def test_many_conversations_are_read_three_times(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    base = save_imported(sharp_model(bpe), bpe, tmp_path / "base", source="a test")
    write_rows(tmp_path / "many.jsonl", pairs(2000))
    explicit = {
        "data": {"train_data": str(tmp_path / "many.jsonl")},
        "checkpoint": {"output_dir": str(tmp_path / "out")},
    }
    config = choose_start(Request(explicit, init_from=str(base))).config
    assert (config.training.epochs, config.training.batch_size) == (3, resolve({}).training.batch_size)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    template = CHAT_TEMPLATE.replace(
        "{%- for message in messages -%}",
        "{%- for message in messages -%}{% if 'rude' in message.content %}{{ raise_exception('No!') }}{% endif %}",
    )
    rows = pairs(30)
    rows[2]["prompt"] = "rude"
    write_rows(tmp_path / "chats.jsonl", rows)
    train, _, notes = read_conversations(
        tmp_path / "chats.jsonl", with_chat_template(bpe, template), val_fraction=0
    )
    assert len(train.ends) == 29
    assert any("chats.jsonl line 3" in note and "No!" in note for note in notes), notes
