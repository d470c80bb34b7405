"""Conversations wherever people keep them: folders, patterns, Parquet, CSV; with rows that are no conversations."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from atlas.cli import main
from atlas.data.sequences.conversations import holds_conversations, read_conversations
from atlas.data.sequences.open import resolve_data
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from tests.archive import documents_of, write_zip

CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
    for n in range(6)
]
ROWS = [{"messages": chat} for chat in CHATS]
PAIRS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(6)]


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def in_folder(path: Path) -> Path:
    (path / "b").mkdir()
    (path / "README.md").write_text("A dataset of questions. " * 100, encoding="utf-8")
    (path / "a.jsonl").write_text(lines(ROWS[:2]), encoding="utf-8")
    (path / "b" / "c.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[2:]).encode()))
    return path


def as_parquet(path: Path) -> Path:
    parquet.write_table(pyarrow.table({"messages": CHATS, "id": [*range(6)]}), path / "a.parquet")
    return path / "a.parquet"


PLACES: dict[str, Callable[[Path], str | Path]] = {
    "folder": in_folder,
    "pattern": lambda path: str(in_folder(path) / "**" / "*.json*"),
    "parquet": as_parquet,
    "csv": lambda path: as_csv(path / "a.csv", PAIRS),
    "tsv": lambda path: as_csv(path / "a.tsv", PAIRS, "\t"),
    "json in csv": lambda path: as_csv(path / "a.csv", [{"messages": json.dumps(chat)} for chat in CHATS]),
    "zip": lambda path: write_zip(
        path / "a.zip", {"x/a.jsonl": lines(ROWS[:3]), "x/b.jsonl": lines(ROWS[3:])}
    ),
    "lists": lambda path: write(path / "a.jsonl", lines(CHATS)),
    "one array": lambda path: write(path / "a.json", json.dumps(CHATS, indent=1)),
    "arrow": lambda path: as_arrow(path / "a.arrow"),
}


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def as_arrow(path: Path) -> Path:
    table = pyarrow.table({"messages": CHATS})
    with pyarrow.ipc.new_stream(path, table.schema) as stream:  # as the datasets library writes them
        stream.write_table(table)
    return path


@pytest.mark.parametrize("place", PLACES)
def test_conversations_are_read_from_any_place(place: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.gpt2()
    path = PLACES[place](tmp_path)
    assert holds_conversations(path)
    chats, _, notes = read_conversations(path, tokenizer, val_fraction=0)
    assert len(chats.ends) == 6
    learnt = tokenizer.decode(chats.tokens[chats.is_answer].tolist())
    assert learnt == "".join(f"It is {n}.<|endoftext|>" for n in range(6))
    assert "6 conversations to train on" in notes[0]


def test_a_few_rows_without_an_answer_are_named_and_left_out(tmp_path: Path) -> None:
    rows = [*PAIRS, {"question": "What is 7?", "answer": ""}, {"question": "?"}]
    path = write(tmp_path / "a.jsonl", lines(rows))
    chats, _, notes = read_conversations(path, Tokenizer.gpt2(), val_fraction=0)
    assert len(chats.ends) == 6
    assert "2 rows or files are left out, since they cannot be used:" in notes
    assert f"{path} line 7: has no answer" in notes
    with pytest.raises(AtlasError, match="line 7: has no answer"):
        read_conversations(path, Tokenizer.gpt2(), val_fraction=0, on_error="stop")
    write(path, lines([*PAIRS, *rows[6:] * 4]))
    with pytest.raises(AtlasError, match="8 rows or files cannot be read"):
        read_conversations(path, Tokenizer.gpt2(), val_fraction=0)
    assert len(read_conversations(path, Tokenizer.gpt2(), val_fraction=0, on_error="skip")[0].ends) == 6


def test_a_layout_may_be_forced(tmp_path: Path) -> None:
    both = [{"messages": chat, "prompt": f"Ask {n}", "response": "Other."} for n, chat in enumerate(CHATS)]
    path = write(tmp_path / "a.jsonl", lines(both))
    for name, answer in ((None, "It is 0."), ("openai", "It is 0."), ("prompt/response", "Other.")):
        chats, *_ = read_conversations(path, Tokenizer.gpt2(), val_fraction=0, chat_format=name)
        assert Tokenizer.gpt2().decode(chats.tokens[chats.is_answer].tolist()).startswith(answer)
    with pytest.raises(
        AtlasError, match="--chat-format vicuna: no such layout; give openai, sharegpt, alpaca"
    ):
        read_conversations(path, Tokenizer.gpt2(), val_fraction=0, chat_format="vicuna")
    with pytest.raises(AtlasError, match="line 1: does not have the layout conversations"):
        read_conversations(path, Tokenizer.gpt2(), val_fraction=0, chat_format="sharegpt")


def test_rows_with_a_text_and_messages_are_conversations_if_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([row | {"text": "plain"} for row in ROWS]))
    with pytest.raises(AtlasError, match=r"both a text and messages.*--chat-format"):
        holds_conversations(path)
    assert holds_conversations(path, "openai")


def test_chats_beside_texts_are_left_out_of_a_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines([{"text": f"Text {n}."} for n in range(50)]))
    write(tmp_path / "chat.jsonl", lines(ROWS[:1]))
    assert documents_of(tmp_path) == [f"Text {n}." for n in range(50)]


def test_info_shows_what_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"messages": [CHATS[0][0], CHATS[0][1] | {"weight": 0}, *CHATS[1]], "source": "web"}]
    path = write(tmp_path / "a.jsonl", lines(rows[::-1]))
    assert main(["info", str(path), "--tokenizer", "gpt2"]) == 0
    shown = capsys.readouterr().out
    assert "7 as messages; messages: 8 user, 8 assistant" in shown
    assert "1 answers are read but not learnt" in shown
    assert "fields that are not used: source" in shown
    assert (
        "It is 0.<|endoftext|>\n<|user|>\nWhat is 1?<|endoftext|>\n<|assistant|>\n«It is 1.<|endoftext|>»"
        in shown
    )


def test_a_folder_of_mostly_texts_is_no_folder_of_conversations(tmp_path: Path) -> None:
    write(tmp_path / "chat.jsonl", lines(ROWS))
    write(tmp_path / "a.txt", "Prose. " * 1000)
    assert not holds_conversations(tmp_path)


def test_the_first_rows_decide_not_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('null\n{"cut": \n{"note": "made by hand"}\n' + lines(ROWS * 2), encoding="utf-8")
    assert holds_conversations(path)
    chats, _, notes = read_conversations(path, Tokenizer.gpt2(), val_fraction=0.0)
    assert len(chats.ends) == 12
    assert "3 rows or files are left out, since they cannot be used:" in notes


def test_names_of_fields_may_have_capitals(tmp_path: Path) -> None:
    rows = [{"Question": row["question"], "Answer": row["answer"]} for row in PAIRS]
    chats, _, _ = read_conversations(as_csv(tmp_path / "a.csv", rows), Tokenizer.gpt2(), val_fraction=0.0)
    plain, _, _ = read_conversations(as_csv(tmp_path / "b.csv", PAIRS), Tokenizer.gpt2(), val_fraction=0.0)
    assert chats.fingerprint == plain.fingerprint


def test_a_layout_for_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(AtlasError, match=r"data\.chat_format alpaca: .* holds no conversations"):
        resolve_data(tmp_path / "a.txt", chat_format="alpaca")


def test_info_shows_a_folder_and_a_pattern_of_chats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_folder(tmp_path)
    for place in (tmp_path, tmp_path / "**" / "*.json*"):
        assert main(["info", str(place), "--chat-format", "openai", "--on-error", "stop"]) == 0
        assert "6 conversations to train on" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "README.md"), "--chat-format", "openai"]) == 2
    assert "--chat-format: is for conversations" in capsys.readouterr().err


def test_info_explains_rows_with_a_text_and_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "words"} | row for row in ROWS]), encoding="utf-8")
    assert main(["info", str(tmp_path / "a.jsonl")]) == 2
    assert "its rows have both a text and messages" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "a.jsonl"), "--chat-format", "openai"]) == 0
