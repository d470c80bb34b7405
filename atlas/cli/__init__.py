"""The `atlas` command. Each subcommand has its own module, which is imported only when the user calls the subcommand.

The typer annotations of the module's main function define the options of the subcommand. The function imports most
modules inside its body, so that `atlas train --help` does not load PyTorch and takes less than a second. For a mistake
in the command line, or in a file that the command line names, `main` prints one line and returns exit code 2.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import typer

from atlas.cli.old_flags import OLD_FLAGS
from atlas.cli.terminal import USER_MISTAKE, printable, say
from atlas.errors import INTERRUPTED, AtlasError, EndedElsewhere, Interrupted, explain
from atlas.process import set_up_process, stop_signals
from atlas.streams import lost_streams, open_closed_streams, protect_streams
from atlas.version import __version__

# The commands in the order in which a user needs them.
COMMANDS = {
    "prepare": "Turn text into token shards.",
    "train": "Train a model, or resume a run.",
    "generate": "Generate text with a trained model.",
    "look": "Show a model's prediction at each position of a text, and how Atlas chooses the next token.",
    "serve": "Start an OpenAI-compatible server for a trained model.",
    "evaluate": "Measure loss, perplexity and bits per byte on a text, or scores in tasks of lm-eval.",
    "report": "Write an HTML page with the curves and results of runs.",
    "export": "Write a GGUF file, verified in llama.cpp, or a folder for Hugging Face's transformers.",
    "import": "Make a checkpoint from a public model in Hugging Face's format, or from an Atlas 1.x checkpoint.",
    "info": "Describe a checkpoint, dataset, tokenizer, GGUF or config file.",
    "plan": "Estimate the memory, disk space, tokens and time that a config needs.",
    "doctor": "Show what this machine can do, and what to fix.",
    "pipeline": "Run all steps from text to a model in one command.",
}

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
_COMPUTE = {"train", "generate", "look", "serve", "evaluate", "export", "import", "doctor", "pipeline"}
FUNCTIONS = {"import": "import_model"}
"""Command → the name of its function and module, for commands whose name is a keyword of Python."""

# The parser raises click's UsageError. Newer versions of typer contain a copy of this class under another name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atlas` with `argv` (default: the arguments of the process) and return the exit code."""
    open_closed_streams()
    protect_streams("stdout", "stderr")
    _speak_utf8()
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    invoked = next((word for word in argv if not word.startswith("-")), None)
    if invoked in _COMPUTE:
        set_up_process()
    try:
        if invoked in _COMPUTE:
            _require_current_folder()
        with _terminated_as_by_ctrl_c():
            code = _build_app(invoked)(args=argv, prog_name="atlas", standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()
    except _UsageError as error:
        help_command = f"atlas {invoked} --help" if invoked in COMMANDS else "atlas --help"
        say(f"error: {_usage_problem(error, argv, invoked)}; see {help_command}")
        return USER_MISTAKE
    except (typer.Abort, KeyboardInterrupt):  # at a question, the end of input also raises Abort
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
    for lost in lost_streams():
        say(f"{lost}: the rest of this output is lost")
    return code or 0


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        # The compiled code of PyTorch discards errors in imports, and would continue with half of a module.
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)
    if number == getattr(signal, "SIGHUP", None):
        # A shell and the system may both send it when a terminal closes.
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted


def _is_importing(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename != _IMPORT_SYSTEM:
        frame = frame.f_back
    return frame is not None


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """Inside this context, SIGTERM, SIGHUP and, on Windows, SIGBREAK raise the same exception as Ctrl-C.

    The exception lets commands clean up unfinished work. Training installs other signal handlers, and at the end
    restores the handlers of this context. Outside the main thread, where Python allows no signal handlers, the context
    has no effect.
    """
    with ExitStack() as previous:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                if signal.getsignal(number) != signal.SIG_IGN:
                    handler = signal.signal(number, _raise_interrupted) or signal.SIG_DFL
                    previous.callback(signal.signal, number, handler)
        yield


def _build_app(invoked: str | None) -> typer.Typer:
    """Return the typer app. The app imports only the invoked command's module; other commands have only their help
    line."""
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
    """Return a function that runs `command` and raises `typer.Abort` instead of `KeyboardInterrupt`. For `typer.Abort`,
    `main` prints a message; for `KeyboardInterrupt`, typer would exit without a message."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Abort from None

    return run


def _require_current_folder() -> None:
    """Raise `AtlasError` if the current folder was removed, since PyTorch then cannot load its libraries."""
    try:
        os.getcwd()
    except OSError:
        raise AtlasError(
            "the current folder was removed or replaced: change to a folder that exists"
        ) from None


def _usage_problem(error: Exception, argv: Sequence[str], invoked: str | None) -> str:
    """Return the parser's message as one line with the option and its value, such as
    `--max-tokens abc: must be a valid integer`."""
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
        problem += (
            '; put a pattern such as "texts/*.txt" in quotes, since otherwise the shell expands the pattern'
        )
    return problem[0].lower() + problem[1:].rstrip(".")


def _speak_utf8() -> None:
    """Set the output streams to UTF-8. Otherwise a non-ASCII character would raise an error on a Windows console, or in
    a pipe with LANG=C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8", errors="replace")
