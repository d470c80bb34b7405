"""`atlas generate`: prompt and text on standard output, everything else on standard error."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.errors import AtlasError
from atlas.tokenizer.chat import Message, newest_that_fit

if TYPE_CHECKING:
    from atlas.inference.load import LoadedModel
    from atlas.inference.sampling import Sampling
    from atlas.inference.text import Prompt

_ROWS_AT_ONCE = 16


def generate(
    checkpoint: Annotated[
        str, typer.Option(help="The checkpoint to speak with.")
    ] = "checkpoints/atlas_best.pt",
    prompt: Annotated[str | None, typer.Option(help="Text to continue; empty: begin a document.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="File with a prompt on each line.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for prompts until end of input.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Prompts are what a user says to a model that learnt from conversations; print its answers.",
        ),
    ] = False,
    output_file: Annotated[
        str | None, typer.Option(help='Write JSON lines {"prompt", "text"} here instead of printing.')
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per text.", min=1)] = 100,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; higher: more random.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens that reach this mass; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens less than this part as likely as the likeliest; 0: none.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what was there before.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option(help="Texts per prompt.", min=1)] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same text; left out: a new one, which is said.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision of weights and cache: auto (half on CUDA, else f32), f32, bf16 or f16.",
            metavar="DTYPE",
        ),
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="package.module:factory, for a model trained with a custom tokenizer.")
    ] = None,
) -> None:
    """Write text with a trained model: --prompt, --prompts-file or --interactive."""
    if sum((prompt is not None, prompts_file is not None, interactive)) != 1:
        raise AtlasError("give one of --prompt TEXT, --prompts-file FILE and --interactive")
    from atlas.inference.layout import lay_out_for_decoding
    from atlas.inference.load import load_model
    from atlas.inference.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt] if prompt is not None else _read_prompts(prompts_file) if prompts_file else []
    if output_file and (Path(output_file).is_dir() or not Path(output_file).parent.is_dir()):
        raise AtlasError(
            f"--output-file {output_file}: cannot be written; name a file in a folder that exists"
        )
    loaded = load_model(checkpoint, device=device, tokenizer=tokenizer, dtype=dtype)
    if chat:
        loaded.check_chat()
    if loaded.model.head_weight.device.type == "cpu":
        lay_out_for_decoding(loaded.model)
    if seed is None:
        seed = secrets.randbelow(2**31)
        if temperature > 0:
            typer.echo(f"seed {seed}", err=True)
    run = _Run(loaded, sampling, max_tokens, stop or [], seed)
    if interactive:
        dialogue: list[Message] = []
        for number, line in enumerate(_ask_prompts()):
            run.seed = seed + number
            if not chat:
                run.print([line] * num_samples)
                continue
            if not line.strip():
                continue
            dialogue = run.remembered([*dialogue, Message("user", line)])
            dialogue.append(Message("assistant", run.print([dialogue] * num_samples)[0]))
        return
    rows = [[Message("user", text)] if chat else text for text in prompts for _ in range(num_samples)]
    if output_file:
        run.write(rows, Path(output_file))
    else:
        run.print(rows)
    typer.echo(f"{run.tokens} tokens, {run.tokens / max(1e-9, run.seconds):,.1f} tokens/s", err=True)


class _Run:
    """The settings of one call, and what it has counted."""

    def __init__(
        self, loaded: LoadedModel, sampling: Sampling, max_tokens: int, stop: list[str], seed: int
    ) -> None:
        self.loaded, self.sampling, self.max_tokens, self.stop, self.seed = (
            loaded,
            sampling,
            max_tokens,
            stop,
            seed,
        )
        self.tokens, self.seconds = 0, 0.0
        self.forgets = False

    def remembered(self, dialogue: list[Message]) -> list[Message]:
        """The end of it that leaves room in the context for an answer."""
        context = self.loaded.config.model.max_seq_len
        room = context - min(self.max_tokens, context // 2)
        kept = newest_that_fit(dialogue, self.loaded.tokenizer, room)
        if len(kept) < len(dialogue) and not self.forgets:
            self.forgets = True
            typer.echo(
                f"the context of {context:,} tokens is full: what was said first is forgotten", err=True
            )
        return kept

    def texts(self, rows: Sequence[Prompt]) -> Iterator[tuple[Prompt, str]]:
        """(prompt, continuation) of every row, many rows at a time."""
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[first : first + _ROWS_AT_ONCE]
            pieces = [""] * len(chunk)
            for step in self._stream(chunk, first):
                pieces = [text + new for text, new in zip(pieces, step, strict=True)]
            yield from zip(chunk, pieces, strict=True)

    def print(self, rows: Sequence[Prompt]) -> list[str]:
        """One text as it is made; several one after the other, a blank line between. Returns what the model wrote."""
        written = []
        if len(rows) == 1:
            _write(_shown(rows[0]))
            for step in self._stream(rows, 0):
                _write(step[0])
                written.append(step[0])
            _write("\n")
            return ["".join(written)]
        for number, (prompt, text) in enumerate(self.texts(rows)):
            _write(("\n" if number else "") + _shown(prompt) + text + "\n")
            written.append(text)
        return written

    def write(self, rows: Sequence[Prompt], path: Path) -> None:
        try:
            with open(path, "w", encoding="utf-8") as file:
                for prompt, text in self.texts(rows):
                    asked = prompt if isinstance(prompt, str) else prompt[-1].content
                    file.write(json.dumps({"prompt": asked, "text": text}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise AtlasError(
                f"--output-file {path}: cannot be written ({error.strerror}); choose another place"
            ) from None
        typer.echo(f"{len(rows)} texts written to {path}", err=True)

    def _stream(self, rows: Sequence[Prompt], first_row: int) -> Iterator[list[str]]:
        from atlas.inference.text import stream_text

        start = time.perf_counter()
        yield from stream_text(
            self.loaded,
            rows,
            self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            seed=self.seed,
            first_row=first_row,
            count=self._count,
        )
        self.seconds += time.perf_counter() - start

    def _count(self, tokens: int) -> None:
        self.tokens += tokens


def _shown(prompt: Prompt) -> str:
    """Of a text its beginning; what was said in a conversation is known."""
    return prompt if isinstance(prompt, str) else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompts(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AtlasError(
            f"--prompts-file {path}: cannot be read ({error.strerror}); give a text file with a prompt on each line"
        ) from None
    except UnicodeDecodeError:
        raise AtlasError(f"--prompts-file {path}: is not UTF-8 text; save it as UTF-8") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise AtlasError(f"--prompts-file {path}: holds no prompt; write one on each line")
    return prompts


def _ask_prompts() -> Iterator[str]:
    """Lines of standard input; a person is shown a prompt sign, a pipe is not."""
    person = sys.stdin.isatty()
    if person:
        typer.echo("Write a prompt and press Enter; end of input (Ctrl-D, on Windows Ctrl-Z) ends.", err=True)
    while True:
        if person:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\r\n")
