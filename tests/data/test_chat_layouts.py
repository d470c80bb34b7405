"""Conversations in the layouts of public datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.data.sequences.conversations import holds_conversations, read_conversations
from atlas.data.text.formats.chats import ChatReport, read_conversation
from atlas.errors import DataError
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import Message
from tests.archive import documents_of, write_folder, write_zip

ASKED, SAID = Message("user", "What is 2?"), Message("assistant", "It is 2.")
TURNS = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "It is 2."}]
CALL = '<tool_call>{"name": "w", "arguments": {"city": "Rome"}}</tool_call>'


def said(role: str, text: str) -> dict[str, object]:
    """A message of ChatGPT's export."""
    return {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}


LAYOUTS: dict[str, tuple[object, list[Message]]] = {
    "messages": (
        {
            "messages": [
                {"role": "user", "content": "What is 2?"},
                {"role": "assistant", "content": "It is 2."},
            ]
        },
        [ASKED, SAID],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What is 2?"}, {"from": "gpt", "value": "It is 2."}]},
        [ASKED, SAID],
    ),
    "Alpaca": ({"instruction": "What is 2?", "input": "", "output": "It is 2."}, [ASKED, SAID]),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        [Message("user", "Add.\n\n1 and 1"), Message("assistant", "2")],
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "1 and 1", "response": "2", "category": "sum"},
        [Message("user", "Add.\n\n1 and 1"), Message("assistant", "2")],
    ),
    "prompt and completion": ({"prompt": "What is 2?", "completion": "It is 2."}, [ASKED, SAID]),
    "question and answer": ({"question": "What is 2?", "answer": "It is 2."}, [ASKED, SAID]),
    "OpenOrca": (
        {"system_prompt": "Be brief.", "question": "What is 2?", "response": "It is 2."},
        [Message("system", "Be brief."), ASKED, SAID],
    ),
    "prompt and completion as messages": (
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "completion": [{"role": "assistant", "content": "d"}],
        },
        [
            Message("user", "a"),
            Message("assistant", "b", False),
            Message("user", "c"),
            Message("assistant", "d"),
        ],
    ),
    "system and history": (
        {"system": "Be brief.", "history": [["a", "b"]], "prompt": "What is 2?", "response": "It is 2."},
        [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), ASKED, SAID],
    ),
    "a bare list": (
        [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "It is 2."}],
        [ASKED, SAID],
    ),
    "parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "It is 2."}]},
            ]
        },
        [ASKED, SAID],
    ),
    "tools": (
        {
            "messages": [
                {"role": "developer", "content": "Use tools."},
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "w", "arguments": '{"city": "Rome"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "21"},
                {"role": "assistant", "content": "21 degrees."},
            ],
            "tools": [],
        },
        [
            Message("system", "Use tools."),
            Message("user", "Weather?"),
            Message("assistant", CALL),
            Message("tool", "21"),
            Message("assistant", "21 degrees."),
        ],
    ),
    "weights": (
        {
            "messages": [
                {"role": "user", "content": "a", "weight": 1},
                {"role": "assistant", "content": "b", "weight": 0},
                {"role": "user", "content": "What is 2?"},
                {"role": "assistant", "content": "It is 2.", "weight": 1},
            ]
        },
        [Message("user", "a"), Message("assistant", "b", False), ASKED, SAID],
    ),
    "ChatGPT's export": (
        {
            "title": "Sums",
            "current_node": "d",
            "mapping": {
                "a": {"message": None, "parent": None, "children": ["b"]},
                "b": {"message": said("system", ""), "parent": "a", "children": ["c"]},
                "c": {"message": said("user", "What is 2?"), "parent": "b", "children": ["x", "t"]},
                "x": {"message": said("assistant", "Replaced."), "parent": "c", "children": []},
                "t": {
                    "message": {"author": {"role": "assistant"}, "content": {"content_type": "thoughts"}},
                    "parent": "c",
                    "children": ["d"],
                },
                "d": {"message": said("assistant", "It is 2."), "parent": "t", "children": []},
            },
        },
        [ASKED, SAID],
    ),
    "ChatGPT's export with sound, a picture of a tool, and no shown end": (
        {
            "mapping": {
                "a": {"message": None, "parent": None},
                "b": {
                    "message": {
                        "author": {"role": "user"},
                        "content": {
                            "content_type": "multimodal_text",
                            "parts": [
                                {"content_type": "audio_transcription", "text": "What is 2?"},
                                {"content_type": "audio_asset_pointer", "asset_pointer": "x"},
                                None,
                            ],
                        },
                    },
                    "parent": "a",
                },
                "c": {
                    "message": {
                        "author": {"role": "tool"},
                        "content": {
                            "content_type": "multimodal_text",
                            "parts": [{"content_type": "image_asset_pointer", "asset_pointer": "y"}],
                        },
                    },
                    "parent": "b",
                },
                "t": {
                    "message": {
                        "author": {"role": "tool"},
                        "content": {"content_type": "tether_browsing_display", "result": "A page."},
                    },
                    "parent": "c",
                },
                "d": {"message": said("assistant", "It is 2."), "parent": "t"},
            },
        },
        [ASKED, Message("tool", "A page."), SAID],
    ),
    "a tool's result within an answer": (
        {
            "chat_messages": [
                {"sender": "human", "text": "Weather?", "content": []},
                {
                    "sender": "assistant",
                    "content": [
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "name": "w", "input": {"city": "Rome"}},
                        {"type": "tool_result", "content": "21"},
                        {"type": "text", "text": "21 degrees."},
                    ],
                },
            ]
        },
        [
            Message("user", "Weather?"),
            Message("assistant", "I look." + CALL),
            Message("tool", "21"),
            Message("assistant", "21 degrees."),
        ],
    ),
    "a preference that repeats the question": (
        {
            "prompt": "What is 2?",
            "chosen": [
                {"role": "user", "content": "What is 2?"},
                {"role": "assistant", "content": "It is 2."},
            ],
        },
        [ASKED, SAID],
    ),
    "Claude's export": (
        {
            "name": "Sums",
            "chat_messages": [
                {
                    "sender": "human",
                    "text": "What is 2?",
                    "content": [{"type": "text", "text": "What is 2?"}],
                },
                {
                    "sender": "assistant",
                    "text": "It is 2.",
                    "content": [{"type": "thinking", "thinking": "2?"}, {"type": "text", "text": "It is 2."}],
                },
            ],
        },
        [ASKED, SAID],
    ),
    "Anthropic's tools": (
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c", "name": "w", "input": {"city": "Rome"}}],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c",
                            "content": [{"type": "text", "text": "21"}],
                        },
                        {"type": "text", "text": "Well?"},
                    ],
                },
                {"role": "assistant", "content": "21 degrees."},
            ]
        },
        [
            Message("user", "Weather?"),
            Message("assistant", CALL),
            Message("tool", "21"),
            Message("user", "Well?"),
            Message("assistant", "21 degrees."),
        ],
    ),
    "preference": (
        {"prompt": "What is 2?", "chosen": "It is 2.", "rejected": "It is 3."},
        [ASKED, SAID],
    ),
    "JSON in a text": (
        {
            "messages": json.dumps(
                [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "It is 2."}]
            )
        },
        [ASKED, SAID],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_of_each_layout(name: str) -> None:
    row, messages = LAYOUTS[name]
    assert read_conversation(row, "row 1", ChatReport()) == messages


@pytest.mark.parametrize("form", ["lines", "array", "indented array"])
def test_only_the_answers_are_learnt_and_what_was_understood_is_said(form: str, tmp_path: Path) -> None:
    rows = [LAYOUTS["weights"][0] | {"id": n} for n in range(3)]  # type: ignore[operator]
    path = tmp_path / ("c.jsonl" if form == "lines" else "c.json")
    content = (
        "\n".join(map(json.dumps, rows))
        if form == "lines"
        else json.dumps(rows, indent=1 if "ind" in form else None)
    )
    path.write_text(content, encoding="utf-8")
    tokenizer = Tokenizer.gpt2()
    read, _, notes = read_conversations(path, tokenizer, val_fraction=0)
    assert len(read.ends) == 3
    learnt = tokenizer.decode(read.tokens[read.is_answer].tolist())
    assert learnt == "It is 2.<|endoftext|>" * 3
    assert "b<|endoftext|>" in tokenizer.decode(read.tokens.tolist())
    said = "\n".join(notes)
    assert "conversations: 3 as messages; messages: 6 user, 6 assistant" in said
    assert "3 answers are read but not learnt, since they are marked with weight 0" in said
    assert "fields that are not used: id" in said


def test_rows_with_a_text_and_messages_are_refused_by_both_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"text": "<s>What is 2?</s>"} | LAYOUTS["messages"][0]  # type: ignore[operator]
    path = tmp_path / "c.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 30, encoding="utf-8")
    for words in (
        ["prepare", "--input", str(path), "--output"],
        ["train", "--train-data", str(path), "--output-dir"],
    ):
        assert main([*words, str(tmp_path / "out")]) == 2
        assert "have both a text and messages" in capsys.readouterr().err
    words = ["prepare", "--input", str(path), "--text-field", "text", "--output", str(tmp_path / "out")]
    assert main([*words, "--clean", "none"]) == 0


@pytest.mark.parametrize(
    "field", [{"chat": "room 1"}, {"turns": 3}, {"messages": []}, {"conversation": ["a"]}]
)
def test_a_text_with_a_field_of_such_a_name_is_a_text(field: dict, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "words"} | field), encoding="utf-8")
    assert documents_of(tmp_path) == ["words"]


def test_a_text_that_begins_like_bzip2_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZh9 is how bzip2 begins.", encoding="utf-8")
    assert documents_of(tmp_path) == ["BZh9 is how bzip2 begins."]


@pytest.mark.parametrize("is_zip", [False, True])
def test_an_export_of_chats_with_its_page_and_its_pictures(is_zip: bool, tmp_path: Path) -> None:
    """ChatGPT's export has the chats twice, as JSON and as a page, and larger files beside them."""
    turns = {"a": {"message": said("user", "What is 2?"), "parent": None}}
    turns["b"] = {"message": said("assistant", "It is 2."), "parent": "a"}
    chats = json.dumps([{"mapping": turns, "current_node": "b"}] * 30)
    files = {
        "conversations.json": chats.encode(),
        "chat.html": f"<!doctype html><html><body><p>{chats * 3}</p></body></html>".encode(),
        "user.json": b'{"id": "user-1", "email": "a@b.c"}',
        "file-1.png": b"\x89PNG" + bytes(200_000),
    }
    write = write_zip if is_zip else write_folder
    path = write(tmp_path / "export", files)
    assert holds_conversations(path)
    chats, _, notes = read_conversations(path, Tokenizer.gpt2(), val_fraction=0.0)
    assert len(chats.ends) == 30
    assert any("ChatGPT's export" in note for note in notes)
    assert any("the same chats as conversations.json" in note for note in notes)


def test_chats_without_a_message_are_counted(tmp_path: Path) -> None:
    rows = [{"uuid": "x", "chat_messages": []}] * 12
    rows += [
        {"chat_messages": [{"sender": "human", "text": "Two?"}, {"sender": "assistant", "text": "2."}]}
    ] * 12
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert holds_conversations(tmp_path / "a.json")
    chats, _, notes = read_conversations(tmp_path / "a.json", Tokenizer.gpt2(), val_fraction=0.0)
    assert len(chats.ends) == 12
    assert "12 conversations without a message are left out" in notes


def test_a_history_nested_without_end_is_refused() -> None:
    row: dict[str, object] = {"prompt": "a", "response": "b"}
    for _ in range(2000):
        row = {"history": [row], "prompt": "a", "response": "b"}
    with pytest.raises(DataError, match="x: its history is nested too deeply"):
        read_conversation(row, "x", ChatReport())


def test_what_an_export_hides_is_counted_by_its_name() -> None:
    turns = LAYOUTS["ChatGPT's export with sound, a picture of a tool, and no shown end"][0]
    report = ChatReport()
    read_conversation(turns, "x", report)
    assert dict(report.passed_over) == {"audio_asset_pointer of a message": 1, "pictures of a tool": 1}
