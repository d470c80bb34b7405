"""`atlas info chats.jsonl`: how a file of conversations is understood, and which tokens the model learns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from atlas.cli.terminal import printable
from atlas.data.sequences.conversations import Conversations, read_conversations
from atlas.tokenizer import Tokenizer

_SHOWN, _SHOWN_TOKENS = 3, 400


def show_conversations(
    path: Path, tokenizer: str | None, chat_format: str | None, on_error: str | None
) -> None:
    """Print how the conversations of a file, a folder or a pattern are understood, and the first of them. Learnt text
    is green or, without colours, between « and »."""
    from rich.console import Console
    from rich.text import Text

    encoder = Tokenizer.resolve(tokenizer) if tokenizer else Tokenizer.gpt2()
    how = {"chat_format": chat_format, "on_error": on_error}
    chats, _, notes = read_conversations(path, encoder, val_fraction=0.0, **how)
    console = Console(highlight=False, soft_wrap=True)
    for note in notes:
        console.print(printable(note), markup=False)
    has_colours = console.color_system is not None and console.is_terminal
    key = "green" if has_colours else "between « and »"
    console.print(f"\nthe first conversations, with the tokens of {encoder.name}; learnt text is {key}:")
    for number in range(min(_SHOWN, len(chats.ends))):
        console.print(f"\n[{number + 1}]", markup=False)
        line = Text()
        for text, is_learnt in _runs(chats, number, encoder):
            if has_colours:
                line.append(text, style="green" if is_learnt else "dim")
            else:
                line.append(f"«{text}»" if is_learnt else text)
        console.print(line)


def _runs(chats: Conversations, number: int, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield the text of a conversation in runs of tokens that are learnt, or are not."""
    start, end = (int(chats.ends[number - 1]) if number else 0), int(chats.ends[number])
    shown = min(end, start + _SHOWN_TOKENS)
    mask = chats.is_answer[start:shown]
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    for first, stop in itertools.pairwise(borders):
        ids = chats.tokens[start + first : start + stop].tolist()
        lines = tokenizer.decode(ids).split("\n")
        yield "\n".join(map(printable, lines)), bool(mask[first])
    if shown < end:
        yield f" … {end - shown:,} more tokens", False
