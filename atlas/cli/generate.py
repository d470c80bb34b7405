"""`atlas generate`: print prompts and generated text on standard output, and messages on standard error."""

from __future__ import annotations

import functools
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.cli import options
from atlas.cli.terminal import say
from atlas.errors import AtlasError
from atlas.files import explain_failed_write, local_path
from atlas.tokenizer.chat import Message, encode_chat, newest_that_fit

if TYPE_CHECKING:
    from atlas.inference.load import LoadedModel
    from atlas.inference.text import Prompt

_BATCH_SIZE = 16
_COMMANDS = (
    "/reset           begin a new conversation with the same system prompt",
    "/system [TEXT]   begin a new conversation with this system prompt, or without one",
    "/help            show these commands",
)

Stream = Callable[..., Iterator[list[str]]]
"""The type of `stream_text` with the settings of this command filled in."""


def generate(
    checkpoint: options.Checkpoint = options.BEST_CHECKPOINT,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; an empty text begins a document.")
    ] = None,
    prompts_file: Annotated[str | None, typer.Option(help="File with a prompt on each line.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for prompts until end of input.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Treat prompts as messages to a chat model, and print only the answers."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: a system prompt, which tells the model how to answer.")
    ] = None,
    output_file: Annotated[
        str | None, typer.Option(help='Write JSON lines {"prompt", "text"} to this file instead of printing.')
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Largest number of new tokens per generation.", min=1)
    ] = 100,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = 50,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the generation before this string. The option may be repeated."),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Generations per prompt.", min=1)] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Random seed: the same seed gives the same text. Default: a new seed, which Atlas prints."
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    context: options.Context = None,
    tokenizer: options.CustomTokenizer = None,
) -> None:
    """Generate text with a trained model, from --prompt, --prompts-file or --interactive."""
    if sum((prompt is not None, prompts_file is not None, interactive)) != 1:
        raise AtlasError("give one of --prompt TEXT, --prompts-file FILE and --interactive")
    if system is not None and not chat:
        raise AtlasError(f"--system {system[:40]}: only with --chat: add --chat, or write it into the prompt")
    from atlas.inference.layout import lay_out_for_decoding
    from atlas.inference.load import load_model
    from atlas.inference.sampling import Sampling
    from atlas.inference.text import stream_text

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt] if prompt is not None else _read_prompts(prompts_file) if prompts_file else []
    written = local_path("--output-file", output_file) if output_file else None
    if written and (written.is_dir() or not written.parent.is_dir()):
        raise AtlasError(f"--output-file {output_file}: cannot be written; name a file in an existing folder")
    loaded = load_model(checkpoint, device=device, tokenizer=tokenizer, dtype=dtype, context=context)
    if chat:
        loaded.check_chat()
    if loaded.model.head_weight.device.type == "cpu":
        lay_out_for_decoding(loaded.model)
    if seed is None:
        seed = secrets.randbelow(2**31)
        if temperature > 0:
            say(f"seed {seed}")
    counts: list[int] = []  # number of tokens in each step
    stream = functools.partial(
        stream_text, loaded, sampling=sampling, max_tokens=max_tokens, stop=stop or [], count=counts.append
    )
    start = time.perf_counter()
    if interactive and chat:
        _talk(loaded, stream, seed, system, max_tokens=max_tokens, num_samples=num_samples)
        return
    if interactive:
        for number, line in enumerate(_ask_prompts("Write a prompt")):
            _show(stream, [line] * num_samples, seed + number)
        return
    rows = [
        [*_system(system), Message("user", text)] if chat else text
        for text in prompts
        for _ in range(num_samples)
    ]
    if written:
        _write(stream, rows, seed, written)
    else:
        _show(stream, rows, seed)
    tokens, seconds = sum(counts), time.perf_counter() - start
    say(f"{tokens} tokens, {tokens / max(1e-9, seconds):,.1f} tokens/s")


def _system(text: str | None) -> list[Message]:
    return [Message("system", text)] if text and text.strip() else []


def _talk(
    loaded: LoadedModel,
    stream: Stream,
    seed: int,
    system: str | None,
    *,
    max_tokens: int,
    num_samples: int,
) -> None:
    """Answer each line of input as a message of one conversation. Each line has its own seed. Of several answers, the
    first one stays in the conversation."""
    context = loaded.config.model.max_seq_len
    room = context - min(max_tokens, context // 2)  # the answer needs the rest of the context

    def fits(messages: Sequence[Message]) -> bool:
        return len(encode_chat(messages, loaded.tokenizer)) <= room

    dialogue = _system(system)
    has_forgotten = False
    for number, line in enumerate(_ask_prompts("Write a message, or /help")):
        if re.match(r"/[a-z]+\b(?!/)", line):
            dialogue = _command(line, dialogue)
        elif line.strip():
            asked = [*dialogue, Message("user", line)]
            dialogue = newest_that_fit(asked, fits)
            if len(dialogue) < len(asked) and not has_forgotten:
                has_forgotten = True
                say(
                    f"the context of {context:,} tokens is full: the model no longer sees the oldest messages"
                )
            dialogue.append(Message("assistant", _show(stream, [dialogue] * num_samples, seed + number)[0]))


def _command(line: str, dialogue: list[Message]) -> list[Message]:
    """Carry out a command of a dialogue, and return the messages that stay."""
    name, _, text = line.strip().partition(" ")
    if name == "/reset":
        say("a new conversation")
        return [message for message in dialogue if message.role == "system"]
    if name == "/system":
        say(
            "a new conversation with this system prompt"
            if text.strip()
            else "a new conversation without a system prompt"
        )
        return _system(text)
    if name != "/help":
        say(f"{name}: no such command: /help lists them")
        return dialogue
    for each in _COMMANDS:
        say(each)
    return dialogue


def _generations(stream: Stream, rows: Sequence[Prompt], seed: int) -> Iterator[tuple[Prompt, Iterable[str]]]:
    """Yield (prompt, pieces of its completion) for every row. A single row is streamed; several rows are generated in
    batches."""
    if len(rows) == 1:
        yield rows[0], (piece for [piece] in stream(rows, seed=seed))
        return
    for first in range(0, len(rows), _BATCH_SIZE):
        batch = rows[first : first + _BATCH_SIZE]
        yield from zip(batch, zip(*stream(batch, seed=seed, first_row=first), strict=True), strict=True)


def _show(stream: Stream, rows: Sequence[Prompt], seed: int) -> list[str]:
    """Print the prompts and their completions, separated by blank lines. Return the completions."""
    texts: list[str] = []
    for prompt, pieces in _generations(stream, rows, seed):
        repeated = prompt if isinstance(prompt, str) else ""  # do not print a conversation again
        print("\n" * bool(texts) + repeated, end="", flush=True)
        texts.append("")
        for piece in pieces:
            print(piece, end="", flush=True)
            texts[-1] += piece
        print(flush=True)
    return texts


def _write(stream: Stream, rows: Sequence[Prompt], seed: int, path: Path) -> None:
    """Write the prompt and the generated text of every row as a JSON line to `path`."""
    failures = explain_failed_write(f"--output-file {path}", "choose another place")
    with failures, open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for prompt, pieces in _generations(stream, rows, seed):
            question = prompt if isinstance(prompt, str) else prompt[-1].content
            row = {"prompt": question, "text": "".join(pieces)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    say(f"{len(rows)} texts written to {path}")


def _read_prompts(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # U+2028 is a part of a prompt
    except OSError as error:
        raise AtlasError(
            f"--prompts-file {path}: cannot be read ({error.strerror}); give a text file with a prompt on each line"
        ) from None
    except UnicodeDecodeError:
        raise AtlasError(f"--prompts-file {path}: is not UTF-8 text; save it as UTF-8") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise AtlasError(f"--prompts-file {path}: contains no prompt; write one prompt on each line")
    return prompts


def _ask_prompts(what: str) -> Iterator[str]:
    """Yield the lines of standard input. On a terminal, say what to write, and print a prompt sign before each line."""
    if sys.stdin is None:
        raise AtlasError("--interactive: standard input is closed: give --prompt TEXT or --prompts-file FILE")
    sign = ""
    if sys.stdin.isatty():
        say(f"{what}, and press Enter; Ctrl-D (on Windows Ctrl-Z) ends the program.")
        sign = "> "
    typer.echo(sign, nl=False, err=True)
    while line := sys.stdin.readline():
        yield line.rstrip("\r\n")
        typer.echo(sign, nl=False, err=True)
