"""`atlas <command>`: one small module per command, imported only when it is called.

Each module has one function with the command's name, whose typer annotations are its options. It imports what it needs
inside the function, so that `atlas --help` does not load PyTorch and takes less than a second. This file turns a user's
mistake, in the command or in a file that it names, into one line and exit code 2.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import typer

from atlas.cli.old_flags import OLD_FLAGS
from atlas.cli.terminal import INTERRUPTED, USER_MISTAKE, printable, say
from atlas.errors import AtlasError, EndedElsewhere, Interrupted, explain
from atlas.process import set_up_process
from atlas.version import __version__

# In the order in which a user needs them.
COMMANDS = {
    "prepare": "Turn text into token shards.",
    "train": "Train a model, or resume a run.",
    "generate": "Generate text with a trained model.",
    "look": "Show how a model reads a text, and how it chooses the next token.",
    "serve": "Start an OpenAI-compatible server for a trained model.",
    "evaluate": "Measure loss, perplexity and bits per byte on a text, or scores in tasks of lm-eval.",
    "report": "Write a page with the curves and results of runs, which opens without a network.",
    "export": "Write a GGUF file and prove it in llama.cpp, or a folder for Hugging Face's transformers.",
    "import": "Make a checkpoint from a public model in Hugging Face's format, or from one of Atlas 1.x.",
    "info": "Describe a checkpoint, dataset, tokenizer, GGUF or config file.",
    "plan": "Estimate memory, disk, tokens and time of a config, before any work.",
    "doctor": "Show what this machine can do, and what to fix.",
    "pipeline": "Run all steps in one command, with questions or without.",
}

_COMPUTE = {"train", "generate", "look", "serve", "evaluate", "export", "import", "doctor", "pipeline"}
FUNCTIONS = {"import": "import_model"}
"""Functions of commands whose name is a keyword of Python."""

# The parser raises click's UsageError, which newer versions of typer contain under another name.
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
        help_command = f"atlas {invoked} --help" if invoked in COMMANDS else "atlas --help"
        say(f"error: {_usage_problem(error, argv, invoked)}; see {help_command}")
        return USER_MISTAKE
    except (typer.Abort, KeyboardInterrupt):  # an Abort also at a question, or at the end of its input
        say("interrupted")
        return INTERRUPTED
    except EndedElsewhere:
        return USER_MISTAKE
    except (AtlasError, OSError, RecursionError, MemoryError) as error:
        line = str(error) if isinstance(error, AtlasError) else explain(error)
        if line is None:
            raise
        say(f"error: {printable(' '.join(line.splitlines()))}")
        return USER_MISTAKE
    return code or 0


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM, SIGHUP and, on Windows, SIGBREAK raise what Ctrl-C raises. So unfinished work is cleaned up.

    Training replaces these handlers by its own and restores them. Outside the main thread Python allows no handlers, so
    nothing changes.
    """
    with ExitStack() as previous:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    handler = signal.signal(number, _raise_interrupted) or signal.SIG_DFL
                    previous.callback(signal.signal, number, handler)
        yield


def _build_app(invoked: str | None) -> typer.Typer:
    """The typer app. It imports only the invoked command's module; the other commands have only their help line."""
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
            app.command(name)(_aborted_by_ctrl_c(function))
        else:
            app.command(name, help=summary)(lambda: None)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"atlas {__version__}")
        raise typer.Exit


def _aborted_by_ctrl_c(command: Callable[..., None]) -> Callable[..., None]:
    """At a `KeyboardInterrupt` typer would end without a line, or with an empty one."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Abort from None

    return run


def _usage_problem(error: Exception, argv: Sequence[str], invoked: str | None) -> str:
    """The parser's message as one line with the value, as in `--max-tokens abc: must be a valid integer`."""
    unknown = getattr(error, "option_name", "")
    if instead := OLD_FLAGS.get(invoked or "", {}).get(unknown):
        return f"no such option: {unknown}; {instead}"
    flags = getattr(getattr(error, "param", None), "opts", [])
    message = str(getattr(error, "message", "")).removeprefix("Value error, ")
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag in flags and message:
            reason = message.replace("Input should be", "must be").rstrip(".")
            return f"{flag} {value if equals else following}: {reason}"
    problem: str = error.format_message()  # type: ignore[attr-defined]
    if "unexpected extra argument" in problem:
        problem += '; a pattern such as "texts/*.txt" goes in quotes, since the shell expands it otherwise'
    return problem[0].lower() + problem[1:].rstrip(".")


def _speak_utf8() -> None:
    """Write UTF-8 also to a Windows console or a pipe with LANG=C, which would fail at a character beyond ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8", errors="replace")
