"""`atlas <command>`: one small module per command, imported only when it is called.

Each module holds one function of its own name, the command's, whose typer annotations are its options, and imports its
work inside it, so that `atlas --help` needs neither PyTorch nor a second. Here a mistake of the user's, in
what they wrote or in what it names, becomes one line and exit code 2.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from atlas.cli.old_flags import hint
from atlas.cli.terminal import INTERRUPTED, USER_MISTAKE, printable
from atlas.errors import AtlasError, EndedElsewhere, Interrupted, explain
from atlas.process import set_up_process
from atlas.version import __version__

# In the order of the road.
COMMANDS = {
    "prepare": "Turn text into token shards.",
    "train": "Train a model, or go on with one.",
    "generate": "Write text with a trained model.",
    "look": "Show how a model reads a text, and how it chooses the next token.",
    "serve": "OpenAI's API over a trained model.",
    "evaluate": "Loss, perplexity and bits per byte of a checkpoint on a text, or its scores in tasks of lm-eval.",
    "report": "One page of the curves and results of runs, which opens without network.",
    "export": "Write a GGUF file and prove it in llama.cpp, or a folder for Hugging Face's transformers.",
    "import": "Make a checkpoint of a public model in Hugging Face's format, or of one of Atlas 1.x.",
    "info": "Describe a checkpoint, dataset, tokenizer, GGUF or config file.",
    "plan": "Memory, disk, tokens and time of a config, before any work.",
    "doctor": "What this machine can do, and what to fix.",
    "pipeline": "The whole road in one command, with questions or without.",
}

_COMPUTE = {"train", "generate", "look", "serve", "evaluate", "export", "import", "doctor", "pipeline"}
FUNCTIONS = {"import": "import_model"}
"""Of commands whose name Python keeps for itself."""

# What the parser raises: click's UsageError, which newer versions of typer bring along under a name of their own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atlas` with `argv` (default: the process's) and return the exit code."""
    _speak_utf8()
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    invoked = next((word for word in argv if not word.startswith("-")), None)
    if invoked in _COMPUTE:
        set_up_process()
    try:
        with _terminated_as_by_ctrl_c():
            code = _build_app(invoked)(args=argv, prog_name="atlas", standalone_mode=False)
    except _UsageError as error:
        typer.echo(f"error: {_usage_problem(error, argv, invoked)}; see {_help_for(invoked)}", err=True)
        return USER_MISTAKE
    except (typer.Abort, KeyboardInterrupt):  # at a question (or its input's end); before the command ran
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except (OSError, RecursionError, MemoryError) as error:
        if (line := explain(error)) is None:
            raise
        _print_error(line)
        return USER_MISTAKE
    return code or 0


def _print_error(line: str) -> None:
    typer.echo(f"error: {printable(' '.join(line.splitlines()))}", err=True)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, SIGHUP and, on Windows, SIGBREAK raise what Ctrl-C raises, so that what is half done is cleaned up.

    Training puts handlers of its own in place of these, and these back. Outside the main thread Python
    allows no handlers; nothing is changed.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, _raise_interrupted)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _build_app(invoked: str | None) -> typer.Typer:
    """The typer app; only the invoked command's module is imported, the others are their help line."""
    app = typer.Typer(
        help="Raw text → tokens → a GPT trained from scratch → text → a GGUF file that llama.cpp runs.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def atlas(
        version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version),
    ) -> None:
        pass

    for name, summary in COMMANDS.items():
        if name == invoked:
            place = FUNCTIONS.get(name, name)
            function = getattr(importlib.import_module(f"atlas.cli.{place}"), place)
            app.command(name)(_with_readable_errors(function))
        else:
            app.command(name, help=summary)(lambda: None)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"atlas {__version__}")
        raise typer.Exit


def _with_readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AtlasError as error:
            _print_error(str(error))
            raise typer.Exit(USER_MISTAKE) from None
        except EndedElsewhere:
            raise typer.Exit(USER_MISTAKE) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


def _usage_problem(error: Exception, argv: Sequence[str], invoked: str | None) -> str:
    """`--max-tokens abc: must be a valid integer`: what the parser says in several lines and without the value."""
    unknown = getattr(error, "option_name", None)
    if unknown and (instead := hint(invoked, unknown)):
        return f"no such option: {unknown}; {instead}"
    flags = getattr(getattr(error, "param", None), "opts", [])
    message = str(getattr(error, "message", "")).removeprefix("Value error, ")
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag in flags and message:
            reason = message.replace("Input should be", "must be").rstrip(".")
            return f"{flag} {value if equals else following}: {reason}"
    whole: str = error.format_message()  # type: ignore[attr-defined]
    if "unexpected extra argument" in whole:
        whole += '; a pattern such as "texts/*.txt" goes in quotes, since the shell takes it apart otherwise'
    return whole[0].lower() + whole[1:].rstrip(".")


def _help_for(invoked: str | None) -> str:
    return f"atlas {invoked} --help" if invoked in COMMANDS else "atlas --help"


def _speak_utf8() -> None:
    """A Windows console, or a pipe with LANG=C, must not die of the first character beyond ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8", errors="replace")
