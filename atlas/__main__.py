"""The entry point of `python -m atlas`, of `torchrun -m atlas`, and of every script in `scripts/`."""

import os
import sys
from pathlib import Path

_NEEDED = {"gguf", "loky", "numpy", "platformdirs", "psutil", "pydantic", "rich", "tiktoken", "tokenizers"}
_NEEDED |= {"torch", "typer", "yaml"}


def run(*words: str) -> int:
    """Run the command line with `words` and the arguments of this process. Return the exit code."""
    try:
        from atlas.cli import main

        return main([*words, *sys.argv[1:]])
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        print(f"error: {_what_to_do(error.name)}", file=sys.stderr)
        return 2


def _what_to_do(package: str) -> str:
    environment = next((name for name in (".venv", "venv") if Path(name, "pyvenv.cfg").exists()), None)
    remedy = "pip install -r requirements.txt"
    if environment:
        command = (
            rf"{environment}\Scripts\activate" if os.name == "nt" else f"source {environment}/bin/activate"
        )
        remedy = f"activate the environment first: {command}"
    return f"this Python ({sys.executable}) has no {package}, which Atlas needs: {remedy}"


if __name__ == "__main__":
    sys.exit(run())
