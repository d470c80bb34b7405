"""Read sound files with a few places changed: the result is the file's content, or one line.

Hypothesis tests each reader in the same way (`tests/training/checkpoint/test_safe_unpickle.py`). So do random bytes
and, if it is installed, atheris, which looks for bytes that reach new lines of code:

    python -m tests.faults.fuzz --minutes 5            random bytes, every reader
    python -m tests.faults.fuzz --minutes 5 --atheris  the same, guided (pip install atheris)
    python -m tests.faults.fuzz --by-hand              the attacks of `attacks.py`, in 1 GB more than an empty process

The random bytes decide which places change and how, see `Choices`, so that the same bytes make the same file
everywhere. A failure is printed with its bytes: `--again READER BYTES` repeats it.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from atlas.errors import AtlasError
from atlas.training.checkpoint.manifest import sidecar_of
from tests.faults import attacks
from tests.faults.attacks import ATTACKS, FIXTURE, READERS, SOUND_CONFIG

LONGEST_READ_S = 20
_CHOICE_BYTES = 48
_NUMBERS = (0, 1, 2, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**48, 2**62, 2**63 - 1, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, -1, -(2**63), 10**400, 0.5, float("nan"), float("inf"), True, None, "", "x", "../x", "/etc/passwd",
    "a\0b", "\x1b[31m", "٣", "\ud800", "x" * 70_000, [], {}, [[]], {"": {}}, ["x"] * 1000, [1, "a", None],
)  # fmt: skip
_YAML = (
    "model:", "training:", "{", "}", "[", "]", "- ", ": ", "&a ", "*a", "<<: ", "!!int ", "!!python/name:os.abort ",
    "? ", "| ", "# ", "'", '"', "1e400", "0x" + "f" * 5000, "9" * 5000, ".nan", "1:30:00", "2020-99-99", "null",
    "seed", "hidden_size", "num_layers: 1e9", "batch_size: 1e308", "\n", "\t", "%YAML 9.9\n---\n", "\ufeff", "\0",
    "[" * 3000,
)  # fmt: skip


class Choices:
    """Numbers and choices that a sequence of bytes decides. After its end, the first choice is always taken."""

    def __init__(self, content: bytes) -> None:
        self._rest = iter(content)

    def below(self, count: int) -> int:
        number = 0
        for _ in range(max(1, (count.bit_length() + 7) // 8)):
            number = number << 8 | next(self._rest, 0)
        return number % count

    def of(self, options: Any) -> Any:
        return options[self.below(len(options))]


def attempt(reader: str, content: bytes, folder: Path) -> bool:
    """Read the file that `content` decides; whether it was refused. Anything but a refusal in one line or a
    result is an error, and so are a file that appears and a read without end."""
    path = _MAKERS[reader](Choices(content), folder)
    before, start, refusal = sorted(folder.rglob("*")), time.monotonic(), ""
    try:
        READERS[reader](path)
    except AtlasError as error:
        refusal = str(error)
    assert refusal.count("\n") == 0
    assert len(refusal) < 2000
    assert sorted(folder.rglob("*")) == before
    assert time.monotonic() - start < LONGEST_READ_S
    return bool(refusal)


# One maker a reader: a sound file, a few places of which are changed


def _changed_bytes(choices: Choices, content: bytes, *, within: int | None = None) -> bytes:
    """Up to four changes among the first `within` bytes: a number put there, bytes taken out or doubled, an end."""
    result = bytearray(content)
    for _ in range(1 + choices.below(4)):
        place = choices.below(min(within or len(result), len(result)) or 1)
        length = choices.of((1, 2, 4, 8))
        match choices.below(5):
            case 0:
                value = choices.of(_NUMBERS) % 2 ** (8 * length)
                result[place : place + length] = value.to_bytes(length, choices.of(("little", "big")))
            case 1:
                result[place : place + 1] = bytes([choices.below(256)])
            case 2:
                del result[place : place + length]
            case 3:
                result[place:place] = result[place : place + 16 * length]
            case 4:
                del result[place:]
    return bytes(result)


def _changed_json(choices: Choices, text: str) -> bytes:
    """Up to three values replaced, taken out or named otherwise; or the bytes changed."""
    if choices.below(4) == 3:
        return _changed_bytes(choices, text.encode())
    root = json.loads(text)
    for _ in range(1 + choices.below(3)):
        place = root
        while True:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = choices.of(keys)
            if isinstance(place[key], (dict, list)) and choices.below(4):
                place = place[key]
                continue
            match choices.below(4):
                case 0 | 1:
                    place[key] = copy.deepcopy(choices.of(_VALUES))
                case 2:
                    del place[key]
                case 3 if isinstance(place, dict):
                    place[str(choices.of(_VALUES))] = place.pop(key)
            break
    return json.dumps(root).encode()


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _archive(choices: Choices, folder: Path) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", choices.of((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as archive:
        archive.writestr("a/b.txt", "some text " * 40)
        archive.writestr(
            choices.of(("wiki_00", "AllCombined.txt", "../x.txt", "b" * 300 + ".md")), "Title\n\nWords.\n\n"
        )
        archive.writestr("rows.jsonl", _changed_json(choices, '{"text": "a row", "id": [1, {"a": 2}]}'))
    content = buffer.getvalue()
    headers = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", content)]
    result = bytearray(content)
    for _ in range(choices.below(4)):  # a field of a header, where most of the format's meaning lies
        place, length = choices.of(headers) + 4 + choices.below(44), choices.of((1, 2, 4))
        field = (choices.of(_NUMBERS) % 2 ** (8 * length)).to_bytes(length, "little")
        result[place : place + length] = field[: len(result) - place]
    if choices.below(2):
        result = bytearray(_changed_bytes(choices, bytes(result)))
    return _written(folder / "a.zip", bytes(result))


def _checkpoint(choices: Choices, folder: Path) -> Path:
    return _changed_checkpoint(choices, FIXTURE, folder / "c.pt")


def _old_checkpoint(choices: Choices, folder: Path) -> Path:
    return _changed_checkpoint(choices, attacks.sound_old_checkpoint(), folder / "c.pt")


def _changed_checkpoint(choices: Choices, original: Path, path: Path) -> Path:
    """Change the pickle and rebuild the zip, so that no checksum protects the reader of pickles."""
    if choices.below(4) == 3:
        return _written(path, _changed_bytes(choices, original.read_bytes()))
    with zipfile.ZipFile(original) as sound, zipfile.ZipFile(path, "w") as archive:
        for member in sound.infolist():
            content = sound.read(member)
            if member.filename.endswith("data.pkl"):
                content = _changed_bytes(choices, content, within=choices.of((100, len(content))))
            archive.writestr(member.filename, content)
    return path


def _sidecar(choices: Choices, folder: Path) -> Path:
    path = _written(folder / FIXTURE.name, FIXTURE.read_bytes())
    _written(sidecar_of(path), _changed_json(choices, sidecar_of(FIXTURE).read_text(encoding="utf-8")))
    return path


def _config(choices: Choices, folder: Path) -> Path:
    text = SOUND_CONFIG
    for _ in range(1 + choices.below(4)):
        place = choices.below(len(text) + 1)
        text = text[:place] + choices.of(_YAML) + text[place + choices.of((0, 0, 1, 8)) :]
    content = text.encode()
    return _written(folder / "c.yaml", _changed_bytes(choices, content) if choices.below(3) == 2 else content)


def _tokenizer(choices: Choices, folder: Path) -> Path:
    return _written(folder / "tokenizer.json", _changed_json(choices, attacks.sound_tokenizer()))


def _dataset(choices: Choices, folder: Path) -> Path:
    """dataset.json changed, or the header or the content of one of its files."""
    names = sorted(file.name for file in attacks.sound_dataset().iterdir())
    target = choices.of(("dataset.json", *names))
    for name in names:
        content = (attacks.sound_dataset() / name).read_bytes()
        if name == target:
            is_json = name.endswith(".json")
            content = (
                _changed_json(choices, content.decode())
                if is_json
                else _changed_bytes(choices, content, within=choices.of((128, len(content))))
            )
        _written(folder / "data" / name, content)
    return folder / "data"


def _gguf(choices: Choices, folder: Path) -> Path:
    content = attacks.sound_gguf()
    return _written(folder / "m.gguf", _changed_bytes(choices, content, within=choices.of((400, 30_000))))


_MAKERS: dict[str, Callable[[Choices, Path], Path]] = {
    "archive": _archive,
    "checkpoint": _checkpoint,
    "sidecar": _sidecar,
    "dataset": _dataset,
    "tokenizer": _tokenizer,
    "config": _config,
    "gguf": _gguf,
    "first-version": _old_checkpoint,
}


# The attacks made by hand


def bad_inputs() -> dict[str, int]:
    """How many attacks made by hand each reader refuses. Raises `AssertionError` naming one that it does not."""
    counts: Counter[str] = Counter()
    for attack in ATTACKS:
        with tempfile.TemporaryDirectory() as folder:
            path = attack.make(Path(folder))
            try:
                READERS[attack.reader](path)
            except AtlasError:
                counts[attack.reader] += 1
            else:
                raise AssertionError(f"{attack.reader}: {attack.name}: was not refused")
    return dict(counts)


def limit_memory(more: int) -> bool:
    """Limit this process to `more` bytes beyond what it has. Return False if that is not known to work here."""
    if not sys.platform.startswith("linux"):
        return False
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return True


# The command


def fuzz(reader: str, seconds: float, seed: int) -> Counter[str]:
    """Read files with random changes for some time. Return the counts of tried, refused and accepted files."""
    source, counts, end = random.Random(f"{seed} {reader}"), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        content = source.randbytes(_CHOICE_BYTES)
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts["refused" if attempt(reader, content, Path(folder)) else "accepted"] += 1
            except BaseException:
                print(f"python -m tests.faults.fuzz --again {reader} {content.hex()}", file=sys.stderr)
                raise
    return counts


def _guided(reader: str, seconds: int) -> str:
    """What atheris says at its end, in a process of its own, which it ends."""
    command = [sys.executable, "-m", "tests.faults.fuzz", "--atheris-here", reader, str(seconds)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        sys.exit(f"{reader}: {done.stderr[-6000:]}")
    lines = re.findall(r"^(?:#\d+\s+DONE.*|Done \d+ runs.*)$", done.stderr, re.MULTILINE)
    return "; ".join(" ".join(line.split()) for line in lines)


def _atheris_here(reader: str, seconds: str) -> None:
    import atheris

    with tempfile.TemporaryDirectory() as folder:  # with everything that is only imported when needed
        attempt(reader, b"", Path(folder))
    for name, module in list(sys.modules.items()):
        if name.startswith(("atlas.", "yaml.", "zipfile", "pickletools", "json.")):
            for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
                for key, function in list(vars(owner).items()):
                    if isinstance(function, FunctionType) and function.__module__ == name:
                        setattr(owner, key, atheris.instrument_func(function))

    def one(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            attempt(reader, content, Path(folder))

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={_CHOICE_BYTES * 2}",
        "-len_control=0",
        "-rss_limit_mb=6000",
        f"-artifact_prefix={tempfile.gettempdir()}/",
    ]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--by-hand", action="store_true")
    parser.add_argument("--again", nargs=2, metavar=("READER", "BYTES"))
    parser.add_argument("--atheris-here", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.atheris_here:
        _atheris_here(*given.atheris_here)
    elif given.again:
        with tempfile.TemporaryDirectory() as folder:
            print(
                "refused"
                if attempt(given.again[0], bytes.fromhex(given.again[1]), Path(folder))
                else "accepted"
            )
    elif given.by_hand:
        attacks.sound_dataset(), attacks.sound_gguf()
        limited = limit_memory(1 << 30)
        for reader, count in bad_inputs().items():
            print(f"{reader:<11}{count:>5} refused{' within 1 GB' if limited else ''}")
    else:
        seconds = 60 * given.minutes / len(given.readers)
        for reader in given.readers:
            if given.atheris:
                print(f"{reader:<11}{_guided(reader, max(1, int(seconds)))}", flush=True)
                continue
            counts = fuzz(reader, seconds, given.seed)
            print(
                f"{reader:<11}{counts.total():>7} tried {counts['refused']:>7} refused, the rest read",
                flush=True,
            )


if __name__ == "__main__":
    main()
