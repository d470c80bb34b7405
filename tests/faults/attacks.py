"""Hostile files, made by hand: each is an attack on one reader, with the expected error message.

`tests/training/checkpoint/test_safe_unpickle.py` reads them one by one. `python -m tests.faults.fuzz` counts them and
mutates sound files.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import pickle
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from atlas.config.loader import read_yaml, resolve
from atlas.data import open_dataset, prepare
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Sources
from atlas.export.gguf import export_gguf, read_gguf
from atlas.export.import_first_version import TENSOR_NAMES, import_first_version
from atlas.files import sha256_of
from atlas.inference import load_model
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manifest import FileEntry, Manifest, sidecar_of, write_manifest
from tests.conftest import corpus

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_v1" / "atlas_step_40.pt"
SOUND_CONFIG = """\
seed: 7
model: {hidden_size: 16, num_layers: 2, num_heads: 2, max_seq_len: 16}
training: {batch_size: 2, max_steps: 2e1, learning_rate: 3e-4}
"""


def _read(sources: Sources) -> list[str]:
    """Read all text, as `atlas prepare` does."""
    report = SourceReport()
    texts = [piece.text for piece in sources.documents(report)]
    report.check_faults(None, total_bytes=sources.total_bytes)
    return texts


READERS: dict[str, Callable[[Path], Any]] = {
    "archive": lambda path: _read(Sources([path])),
    "checkpoint": lambda path: load_model(path),
    "sidecar": lambda path: load_checkpoint(path),
    "dataset": lambda path: open_dataset(path).tokenizer(),
    "tokenizer": lambda path: Tokenizer.load(path),
    "config": lambda path: resolve(read_yaml(path)),
    "gguf": lambda path: read_gguf(path),
    "first-version": lambda path: import_first_version(path, num_heads=2, tokenizer=str(sound_dataset())),
}


@dataclass(frozen=True)
class Attack:
    """`make` writes the file into an empty folder and returns the path to read; `says` is part of the error message."""

    reader: str
    name: str
    make: Callable[[Path], Path]
    says: str


ATTACKS: list[Attack] = []


def attack(reader: str, name: str, says: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        ATTACKS.append(Attack(reader, name, make, says))
        return make

    return add


# Sound files, from which most attacks are made


@cache
def sound_contents() -> dict[str, Any]:
    return torch.load(FIXTURE, weights_only=True)


@cache
def sound_tokenizer() -> str:
    return str(sound_contents()["tokenizer"]["json"])


@cache
def sound_gguf() -> bytes:
    path = _scratch() / "model.gguf"
    loaded = load_model(FIXTURE)
    export_gguf(loaded.model, loaded.tokenizer, path, quantize="f32")
    return path.read_bytes()


@cache
def sound_dataset() -> Path:
    folder = _scratch()
    rows = [json.dumps({"text": f"{line} {number}."}) for number, line in enumerate(corpus(300).splitlines())]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "tokenizer.json").write_text(sound_tokenizer(), encoding="utf-8")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prepare([folder / "rows.jsonl"], folder / "data", tokenizer, shard_tokens=700)
    return folder / "data"


@cache
def sound_old_weights() -> dict[str, torch.Tensor]:
    """The weights of the sound checkpoint, with the names of Atlas 1.x."""
    weights = dict(sound_contents()["model_state_dict"])
    weights["token_embedding.weight"] = weights["token_embedding.weight"][:300].clone()
    weights["lm_head.weight"] = weights["token_embedding.weight"]
    names = {a.format(block): b.format(block) for a, b in TENSOR_NAMES.items() for block in range(2)}
    return {names[name]: tensor for name, tensor in weights.items()}


def old_checkpoint(folder: Path, weights: Mapping[Any, Any] = MappingProxyType({}), **entries: Any) -> Path:
    """A checkpoint of Atlas 1.x, with some of its weights or entries replaced."""
    contents = {"model_state_dict": sound_old_weights() | weights, "metadata": {"step": 40}}
    torch.save(contents | entries, folder / "old.pt")
    return folder / "old.pt"


@cache
def sound_old_checkpoint() -> Path:
    return old_checkpoint(_scratch())


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="atlas-attacks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Archives


def zip_of(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def named(name: str) -> Callable[[Path], Path]:
    return lambda folder: zip_of(folder / "a.zip", {name: b"text"})


for label, member in {
    "parent": "../evil.txt",
    "inner parent": "a/../../evil.txt",
    "backslashes": "..\\evil.txt",
    "absolute": "/etc/evil.txt",
    "drive": "C:\\evil.txt",
    "share": "\\\\host\\evil.txt",
}.items():
    attack("archive", f"path: {label}", "points outside the archive; it is not safe")(named(member))
attack("archive", "name with escape codes", "a name that no file can have")(named("\x1b]0;owned\x07.txt"))
attack("archive", "name of 60,000 digits", "a name that no file can have")(named("7" * 60_000 + ".txt"))


@attack("archive", "name that ends at NUL", "a name that no file can have")
def _(folder: Path) -> Path:
    path = named("evilX.txt")(folder)
    path.write_bytes(path.read_bytes().replace(b"evilX", b"evil\0"))
    return path


@attack("archive", "bomb", "may be a zip bomb: … more than 200 times as many; … --trust-archives")
def bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.txt", "w") as member:
            for _ in range(110):
                member.write(bytes(1_000_000))
    return folder / "bomb.zip"


def with_directory(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """Change the directory's entry of the first member; it begins at the place given."""
    content = bytearray(path.read_bytes())
    change(content, content.index(b"PK\x01\x02"))
    path.write_bytes(content)
    return path


@attack("archive", "4 GB claimed in 100 bytes", "may be a zip bomb")
def _(folder: Path) -> Path:
    def claim(content: bytearray, entry: int) -> None:
        content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)

    return with_directory(named("a.txt")(folder), claim)


@attack("archive", "directory of 2^31 bytes", "is not a zip archive")
def _(folder: Path) -> Path:
    path = named("a.txt")(folder)
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    return path


@attack("archive", "zip64 directory of 2^62 bytes", "is not a zip archive")
def _(folder: Path) -> Path:
    path = named("a.txt")(folder)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, 2**62, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    path.write_bytes(content[:end] + record + locator + content[end:])
    return path


@attack("archive", "members over each other", "overlaps the data after it")
def overlapping(folder: Path) -> Path:
    """Fifield's kernel (USENIX WOOT 2019): every entry of the directory refers to the same compressed bytes."""
    path = zip_of(folder / "a.zip", {"a.txt": bytes(1_000_000), "b.txt": b""})
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 4)
    content[second + 10 : second + 46] = content[first + 10 : first + 46]
    path.write_bytes(content)
    return path


@attack("archive", "bzip2, gigabytes at once", "has a compression that Atlas does not read")
def _(folder: Path) -> Path:
    return zip_of(folder / "a.zip", {"a.txt": bytes(10_000_000)}, zipfile.ZIP_BZIP2)


@attack("archive", "LZMA with a dictionary of its own choice", "has a compression that Atlas does not read")
def _(folder: Path) -> Path:
    return zip_of(folder / "a.zip", {"a.txt": b"text"}, zipfile.ZIP_LZMA)


def field(offset: int, form: str, value: int) -> Callable[[bytearray, int], None]:
    return lambda content, entry: struct.pack_into(form, content, entry + offset, value)


for label, place, form, value, answer in [
    ("encrypted", 8, "<H", 1, "is encrypted; unpack it first"),
    ("method 93", 10, "<H", 93, "a compression that Atlas does not read"),
    ("wrong checksum", 16, "<I", 7, "the archive is damaged"),
    ("more bytes than it claims", 24, "<I", 2, "the archive is damaged"),
    ("member beyond the end", 42, "<I", 10**8, "overlaps"),
]:
    attack("archive", label, answer)(
        lambda folder, place=place, form=form, value=value: with_directory(
            named("a.txt")(folder), field(place, form, value)
        )
    )


@attack("archive", "nothing but links", "nothing to read")
def link_in_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        member = zipfile.ZipInfo("passwords.txt")
        member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return folder / "a.zip"


@attack("archive", "folder of links that lead out", "links that lead out of their folder")
def links_out(folder: Path) -> Path:
    (folder / "private.txt").write_text("secret", encoding="utf-8")
    given = folder / "given"
    given.mkdir()
    (given / "a.txt").symlink_to(folder / "private.txt")
    (given / "loop").symlink_to(given)
    (given / "b.txt").symlink_to(given / "b.txt")
    return given


if hasattr(os, "mkfifo"):

    @attack("archive", "folder of pipes", "nothing to read")
    def _(folder: Path) -> Path:
        (folder / "given").mkdir()
        os.mkfifo(folder / "given" / "a.txt")
        return folder / "given"


@attack("archive", "row without an end", "line 1: is longer than")
def _(folder: Path) -> Path:
    with (folder / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(80):
            file.write(b"a" * (1 << 20))
    return folder / "a.jsonl"


# Checkpoints


def short(text: str) -> bytes:
    content = text.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(
    size: tuple[int, ...], stride: tuple[int, ...], *, numel: int = 16, offset: int = 0, key: str = "0"
) -> bytes:
    """The instructions that `torch.save` writes for a tensor of 32-bit numbers."""
    storage = short("storage") + name_of("torch", "FloatStorage") + short(key) + short("cpu") + number(numel)
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    hooks = name_of("collections", "OrderedDict") + b")R"
    arguments = b"((" + storage + b"tQ" + number(offset) + shape + b"\x89" + hooks + b"t"
    return name_of("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return name_of(module, name) + b"(" + b"".join(arguments) + b"tR"


def forged(program: bytes, method: int = zipfile.ZIP_STORED) -> Callable[[Path], Path]:
    """A `.pt` file with this program and one storage of 16 numbers."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "forged.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", bytes(64), method)
        return folder / "forged.pt"

    return make


REFUSED = "refused without running it"
PROGRAMS = {
    "code": (call("posix", "system", short("touch exploded")), "it imports posix.system"),
    "64 GB by bytearray": (call("builtins", "bytearray", number(2**36)), "it imports builtins.bytearray"),
    "256 GB by torch.Tensor": (call("torch", "Tensor", number(2**36)), "it imports torch.Tensor"),
    "storage that is called": (call("torch", "FloatStorage", number(2**40)), "with unexpected arguments"),
    "2^40 numbers over one": (tensor((2**40,), (0,)), "does not fit its storage"),
    "2^60 by 4 dimensions": (tensor((2**15,) * 4, (0,) * 4), "does not fit its storage"),
    "tensor beyond its storage": (tensor((17,), (1,)), "does not fit its storage"),
    "tensor that begins outside": (tensor((1,), (1,), offset=16), "does not fit its storage"),
    "strides outside": (tensor((4, 4), (5, 1)), "does not fit its storage"),
    "storage of 2^60 in a record of 64 bytes": (tensor((1,), (1,), numel=2**60), "has a record of 64"),
    "negative size": (tensor((-1,), (1,)), "impossible shape"),
    "a thousand dimensions": (tensor((1,) * 1000, (1,) * 1000), "impossible shape"),
    "record that is not there": (tensor((1,), (1,), key="9"), "is damaged"),
    "record outside the folder": (tensor((1,), (1,), key="../data.pkl"), "is damaged"),
    "meta tensor": (
        call("torch._utils", "_rebuild_meta_tensor_no_storage", name_of("torch", "float32"), number(1)),
        "it imports torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "sparse tensor": (call("torch._utils", "_rebuild_sparse_tensor", number(1)), "_rebuild_sparse_tensor"),
    "quantized tensor": (call("torch._utils", "_rebuild_qtensor", number(1)), "_rebuild_qtensor"),
    "tensor of another class": (call("torch._tensor", "_rebuild_from_type_v2", number(1)), "_rebuild_from"),
    "string of 2^62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"x", "is damaged"),
    "string of 4 GB": (b"X" + struct.pack("<I", 2**32 - 1) + b"x", "is damaged"),
    "number of 2^31 bytes": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x", "is damaged"),
    "lists within lists": (b"]" * 10_000 + b"a" * 9_999, "deeper than 32 levels"),
    "list that holds itself": (b"]q\x00h\x00a", "deeper than 32 levels"),
    "lists of the same list, 10^30 in all": (
        b"]q\x00" + b"".join(b"]q" + bytes([n + 1]) + b"(" + b"h%c" % n * 10 + b"e" for n in range(30)),
        "values, or nests them deeper",
    ),
    "six million lists": (b"(" + b"]" * 6_000_000 + b"t", "instructions"),
    "no end": (b"]" + b"0", REFUSED),
    "empty stack": (b"R", "it is damaged"),
    "key without hash": (b"}(]Nu", "it is damaged"),
    "a set": (b"\x8f", "the instruction EMPTY_SET"),
    "an object": (name_of("torch", "Tensor") + b")\x81", "it imports torch.Tensor"),
    "extension registry": (b"\x82\x01", "the instruction EXT1"),
    "just a tensor": (tensor((16,), (1,)), "no format_version"),
}
for label, (program, answer) in PROGRAMS.items():
    attack("checkpoint", label, answer)(forged(program))
attack("checkpoint", "compressed records", "is compressed or encrypted")(
    forged(tensor((1,), (1,)), zipfile.ZIP_DEFLATED)
)


@attack("checkpoint", "pickle without a zip", "is not an Atlas checkpoint")
def _(folder: Path) -> Path:
    torch.save(sound_contents(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


@attack("checkpoint", "two records of one name", "two records of the same name")
def _(folder: Path) -> Path:
    path = forged(tensor((1,), (1,)))(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/1", bytes(64))
    content = path.read_bytes().replace(b"archive/data/1", b"archive/data/0")
    path.write_bytes(content)
    return path


@attack("checkpoint", "two programs", "more than one")
def _(folder: Path) -> Path:
    path = forged(tensor((1,), (1,)))(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02N.")
    return path


@attack("checkpoint", "another machine's byte order", "byte order")
def _(folder: Path) -> Path:
    path = forged(tensor((1,), (1,)))(folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/byteorder", "big")
    return path


def changed(**entries: Any) -> Callable[[Path], Path]:
    """The sound checkpoint with some of its entries replaced, as `torch.save` writes it."""

    def make(folder: Path) -> Path:
        torch.save({**sound_contents(), **entries}, folder / "changed.pt")
        return folder / "changed.pt"

    return make


def reconfigured(**model: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        config = sound_contents()["config"]
        return changed(config={**config, "model": {**config["model"], **model}})(folder)

    return make


WEIGHTS = sound_contents()["model_state_dict"]
CONTENTS = {
    "10^9 layers": (reconfigured(num_layers=10**9), "num_layers is wrong: … 10000"),
    "10,000 layers that are not there": (
        reconfigured(num_layers=10_000),
        "do not fit its config … are there",
    ),
    "10^12 parameters that are not there": (
        reconfigured(hidden_size=2**18, num_heads=1),
        "weights do not fit its config … are there",
    ),
    "context of 2^31": (reconfigured(max_seq_len=2**31), "do not fit its config"),
    "no vocabulary": (reconfigured(vocab_size=None), "a vocabulary of None"),
    "a config with another setting": (reconfigured(exec="rm"), "is not a complete Atlas checkpoint"),
    "a layer too many": (changed(model_state_dict={**WEIGHTS, "x": torch.zeros(1)}), "do not fit its config"),
    "weights that are text": (changed(model_state_dict=dict.fromkeys(WEIGHTS, "x")), "do not fit its config"),
    "2^62 updates": (changed(step=2**62), "step is wrong"),
    "minus one update": (changed(step=-1), "step is wrong"),
    "an update called True": (changed(step=True), "step is wrong"),
    "loss of text": (changed(loss="\x1b[31m0.1"), "loss is wrong"),
    "unknown entry that is a dict": (changed(other={"a": {}}), "other … is wrong"),
    "format of 4,000 digits": (
        changed(format_version=10**400),
        "checkpoint format 1000000000 … update Atlas",
    ),
    "machine that is nested": (changed(machine={"cpu": ["x"]}), "machine.cpu"),
    "tokenizer of nothing": (changed(tokenizer={}), "is not one Atlas knows"),
    "tokenizer of custom code": (changed(tokenizer={"kind": "custom", "name": "os:abort"}), "is custom code"),
    "tokenizer of another size": (
        changed(tokenizer={**sound_contents()["tokenizer"], "vocab_size": 2**24}),
        "vocab_size 300, not 16777216",
    ),
}
for label, (make, answer) in CONTENTS.items():
    attack("checkpoint", label, answer)(make)
if hasattr(os, "mkfifo"):

    @attack("checkpoint", "a pipe", "no such checkpoint")
    def _(folder: Path) -> Path:
        os.mkfifo(folder / "pipe.pt")
        return folder / "pipe.pt"


# Checkpoints of Atlas 1.x

BIAS = "blocks.0.mlp.fc1.bias"
OLD_WEIGHTS: dict[str, tuple[dict[Any, Any], str]] = {
    "a block of a large number": (
        {"blocks.1000000000.ln1.weight": torch.ones(16)},
        "lacks … is the file complete?",
    ),
    "a name that is a number": ({7: torch.ones(16)}, "7 is not a matrix or vector"),
    "weights that are text": ({BIAS: "x"}, f"{BIAS} is not a matrix or vector"),
    "a weight without dimensions": ({BIAS: torch.tensor(1.0)}, f"{BIAS} is not a matrix or vector"),
    "a weight of another size": (
        {BIAS: torch.ones(3)},
        "the shapes of its tensors do not match: size mismatch",
    ),
    "a weight that is not there": ({BIAS: torch.ones(64)[::2]}, f"{BIAS} is not a matrix or vector"),
    "weights that share their numbers": (
        {BIAS: sound_old_weights()["blocks.1.mlp.fc1.bias"]},
        "several of its tensors share memory",
    ),
    "a head of no numbers": ({"lm_head.weight": torch.ones(0, 16)}, "the shapes of its tensors do not match"),
}
for label, (weights, answer) in OLD_WEIGHTS.items():
    attack("first-version", label, answer)(partial(old_checkpoint, weights=weights))
attack("first-version", "code in its metadata", "refused without running it … getcwd")(
    partial(old_checkpoint, metadata={"step": os.getcwd})
)


# Sidecars


def sidecar_with(**entries: Any) -> Callable[[Path], Path]:
    """A sound checkpoint and its sidecar, with some entries replaced (None: removed)."""

    def make(folder: Path) -> Path:
        path = folder / "atlas_step_40.pt"
        shutil.copy(FIXTURE, path)
        manifest = json.loads(sidecar_of(FIXTURE).read_text(encoding="utf-8")) | entries
        content = json.dumps({key: value for key, value in manifest.items() if value is not None})
        sidecar_of(path).write_text(content, encoding="utf-8")
        return path

    return make


def entry_of(path: Path, **entries: Any) -> dict[str, Any]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path), **entries}


def raw_sidecar(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = sidecar_with()(folder)
        sidecar_of(path).write_bytes(content)
        return path

    return make


NOT_SAVED = "is not the file that was saved"
SIDECARS: dict[str, dict[str, Any]] = {
    "2^62 updates": {"step": 2**62},
    "10^400 updates": {"step": 10**400},
    "minus one update": {"step": -1},
    "update of text": {"step": "forty"},
    "no files": {"files": []},
    "two files": {"files": [entry_of(FIXTURE)] * 2},
    "file above": {"files": [entry_of(FIXTURE, name="../atlas_step_40.pt")]},
    "file elsewhere": {"files": [entry_of(FIXTURE, name="/etc/passwd")]},
    "file on a drive": {"files": [entry_of(FIXTURE, name="C:atlas_step_40.pt")]},
    "file with a line end": {"files": [entry_of(FIXTURE, name="a\nb")]},
    "size of 2^80": {"files": [entry_of(FIXTURE, size=2**80)]},
    "size below zero": {"files": [entry_of(FIXTURE, size=-1)]},
    "hash of text": {"files": [entry_of(FIXTURE, sha256="x" * 64)]},
    "other hash": {"files": [entry_of(FIXTURE, sha256="0" * 64)]},
    "other size": {"files": [entry_of(FIXTURE, size=3)]},
    "another format": {"format": "atlas-dataset"},
    "another kind": {"kind": "worst"},
    "model of text": {"model": "large"},
}
for label, entries in SIDECARS.items():
    attack("sidecar", label, NOT_SAVED)(sidecar_with(**entries))
for label, content in {
    "nothing": b"",
    "NULs": bytes(100),
    "not JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b'{"format": "\xff"}',
    "2 MB": b" " * (2 << 20),
    "100,000 deep": b"[" * 100_000,
    "100,000 deep in replaces": b'{"replaces": ' * 50_000,
}.items():
    attack("sidecar", label, NOT_SAVED)(raw_sidecar(content))


@attack("sidecar", "replaced a hundred times", NOT_SAVED)
def _(folder: Path) -> Path:
    path = sidecar_with()(folder)
    whole = manifest = json.loads(sidecar_of(path).read_text(encoding="utf-8"))
    for _ in range(100):
        manifest["replaces"] = dict(manifest, files=[entry_of(FIXTURE, sha256="0" * 64)])
        manifest = manifest["replaces"]
    sidecar_of(path).write_text(json.dumps(whole), encoding="utf-8")
    return path


@attack("sidecar", "vouches for another file than its own", NOT_SAVED)
def vouching_for_another(folder: Path) -> Path:
    sound = sidecar_with()(folder)
    evil = folder / "evil.pt"
    evil.write_bytes(sound.read_bytes()[:-1] + b"X")
    shutil.copy(sidecar_of(sound), sidecar_of(evil))
    return evil


@attack("sidecar", "vouches for code", REFUSED)
def _(folder: Path) -> Path:
    path = forged(PROGRAMS["code"][0])(folder)
    entry = FileEntry(name=path.name, size=path.stat().st_size, sha256=sha256_of(path))
    facts = {"step": 1, "epoch": 0, "sequences_consumed": 1, "model": {}, "data_fingerprint": ""}
    write_manifest(path, Manifest(kind="step", files=(entry,), **facts))
    return path


@attack("sidecar", "vouches for a legacy pickle", "is not an Atlas checkpoint")
def _(folder: Path) -> Path:
    path = folder / "old.pt"
    path.write_bytes(pickle.dumps({"format_version": 1}))
    facts = {"step": 1, "epoch": 0, "sequences_consumed": 1, "model": {}, "data_fingerprint": ""}
    write_manifest(path, Manifest(kind="step", files=(FileEntry(**entry_of(path)),), **facts))
    return path


if hasattr(os, "mkfifo"):

    @attack("sidecar", "a pipe", NOT_SAVED)
    def _(folder: Path) -> Path:
        path = sidecar_with()(folder)
        sidecar_of(path).unlink()
        os.mkfifo(sidecar_of(path))
        return path

    @attack("sidecar", "a device without an end", NOT_SAVED)
    def _(folder: Path) -> Path:
        path = sidecar_with()(folder)
        sidecar_of(path).unlink()
        sidecar_of(path).symlink_to("/dev/zero")
        return path


# Datasets


def dataset_with(change: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], Path]:
    """A copy of the sound dataset, changed; `change` gets the folder and what dataset.json says."""

    def make(folder: Path) -> Path:
        copy = folder / "data"
        shutil.copytree(sound_dataset(), copy)
        manifest = json.loads((copy / "dataset.json").read_text(encoding="utf-8"))
        change(copy, manifest)
        (copy / "dataset.json").write_text(json.dumps(manifest), encoding="utf-8")
        return copy

    return make


def in_manifest(path: str, value: Any) -> Callable[[Path], Path]:
    def change(folder: Path, manifest: Any) -> None:
        *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in outer:
            manifest = manifest[key]
        manifest[last] = value

    return dataset_with(change)


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': ({},), }}"


def npy(header: str, body: bytes = bytes(64)) -> bytes:
    padded = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + body


def shard_of(content: bytes) -> Callable[[Path], Path]:
    return dataset_with(lambda folder, _: (folder / "train-00000.npy").write_bytes(content) and None)


def starts_of(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Path]:
    def write(folder: Path, manifest: dict[str, Any]) -> None:
        path = folder / "train-00000.docs.npy"
        np.save(path, change(np.load(path, allow_pickle=False)), allow_pickle=False)

    return dataset_with(write)


SHARD = "splits/train/shards/0"
for label, (key, value, answer) in {
    "2^62 tokens in a shard": (f"{SHARD}/tokens", 2**62, "less than or equal to"),
    "2^48 tokens": ("splits/train/tokens", 2**48, "are not the sum"),
    "10^400 documents": ("splits/train/documents", 10**400, "prepare the dataset again"),
    "-1 tokens": (f"{SHARD}/tokens", -1, "greater than or equal"),
    "2^62 bytes": ("splits/train/bytes", 2**62, "less than or equal"),
    "shard above": (f"{SHARD}/file", "../train-00000.npy", "pattern"),
    "shard elsewhere": (f"{SHARD}/file", "/etc/passwd", "pattern"),
    "shard in Arabic digits": (f"{SHARD}/file", "train-٠٠٠٠٠.npy", "pattern"),
    "shard that ends in a line end": (f"{SHARD}/file", "train-00000.npy\n", "pattern"),
    "shard listed twice": ("splits/train/shards/1/file", "train-00000.npy", "twice"),
    "vocabulary of 2^62": ("tokenizer/vocab_size", 2**62, "do not make a vocabulary"),
    "tokenizer without a name": ("tokenizer/name", None, "has no kind, name and fingerprint"),
    "objects as tokens": ("dtype", "|O", "does not fit a vocabulary"),
    "tokenizer of code": ("tokenizer/kind", "custom", "is custom code"),
    "unknown entry": ("exec", "rm", "Extra inputs"),
    "no training part": ("splits", {}, "are not train and val"),
    "empty training part": (
        "splits/train",
        {"documents": 0, "tokens": 0, "bytes": 0, "shards": []},
        "no tokens",
    ),
    "version of 10^400": ("version", 10**400, "format version 1000000000"),
}.items():
    attack("dataset", label, answer)(in_manifest(key, value))
for label, content, answer in [
    ("header of 2^59 tokens", npy(HEADER.format("<u2", 2**59)), "holds (576460752303423488,)"),
    ("header of objects", npy(HEADER.format("|O", 32)), "is not a token shard"),
    ("header of negative size", npy(HEADER.format("<u2", -1)), "is not a token shard"),
    ("header in two dimensions", npy(HEADER.format("<u2", "4, 8")), "is not a token shard"),
    ("header of code", npy("__import__('os').abort()"), "is not a token shard"),
    ("header of brackets", npy("(" * 9000), "is not a token shard"),
    ("header of tildes", npy("-" * 9000 + "1"), "is not a token shard"),
    (
        "header of a large number",
        npy("{'descr':'<u2','shape':(" + "9" * 5000 + ",)}"),
        "is not a token shard",
    ),
    ("header that is a pickle", pickle.dumps([1, 2]), "is not a token shard"),
    ("file without bytes", b"", "is not a token shard"),
]:
    attack("dataset", label, answer)(shard_of(content))
attack("dataset", "documents backwards", "do not begin in order")(
    starts_of(lambda starts: starts[::-1].copy())
)
attack("dataset", "documents beyond the end", "do not begin in order")(
    starts_of(lambda starts: starts + 2**62)
)
attack("dataset", "documents before the beginning", "do not begin in order")(
    starts_of(lambda starts: starts - 2**40)
)
attack("dataset", "documents as pickles", "is not a token shard")(
    dataset_with(lambda folder, _: (folder / "train-00000.docs.npy").write_bytes(pickle.dumps([1])) and None)
)


def dataset_json(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "dataset.json").write_bytes(content)
        return folder

    return make


attack("dataset", "dataset.json 100,000 deep", "cannot be read")(dataset_json(b"[" * 100_000))
attack("dataset", "dataset.json not UTF-8", "cannot be read")(dataset_json(b'{"a": "\xff"}'))
attack("dataset", "dataset.json of 10,000 digits", "cannot be read")(
    dataset_json(b'{"a": ' + b"9" * 10_000 + b"}")
)


@attack("dataset", "dataset.json of 10 GB", "that are allowed")
def _(folder: Path) -> Path:
    with (folder / "dataset.json").open("wb") as file:
        file.truncate(10 << 30)  # a hole, which needs no space
    return folder


if hasattr(os, "mkfifo"):
    for label, file_name in [("shard", "train-00000.npy"), ("tokenizer", "tokenizer.json")]:

        @attack("dataset", f"{label} that is a pipe", "is not a regular file")
        def _(folder: Path, file_name: str = file_name) -> Path:
            copy = folder / "data"
            shutil.copytree(sound_dataset(), copy)
            (copy / file_name).unlink()
            os.mkfifo(copy / file_name)
            return copy


# Tokenizers


def tokenizer_of(content: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / "tokenizer.json").write_bytes(data)
        return folder / "tokenizer.json"

    return make


def tokenizer_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        content = json.loads(sound_tokenizer())
        change(content)
        return tokenizer_of(json.dumps(content))(folder)

    return make


for label, content, answer in [
    ("100,000 deep", "[" * 100_000, "is not a tokenizer.json"),
    ("not UTF-8", b'{"model": "\xff"}', "it is not UTF-8"),
    ("number of 10,000 digits", '{"model": ' + "9" * 10_000 + "}", "is not a tokenizer.json"),
    ("list", "[]", "has no model"),
    ("half a character", '{"model": {"type": "\\ud800\\u001b[31m"}}', "not BPE"),
    ("type of a megabyte", '{"model": {"type": "' + "x" * 10**6 + '"}}', "not BPE"),
]:
    attack("tokenizer", label, answer)(tokenizer_of(content))
for label, change, answer in [
    ("id of 2^62", lambda c: c["model"]["vocab"].update(x=2**62), "without a gap"),
    ("ids given twice", lambda c: c["model"]["vocab"].update(x=5), "without a gap"),
    ("ids that are lists", lambda c: c["model"]["vocab"].update(x=[1]), "without a gap"),
    (
        "token of 100,000 bytes",
        lambda c: c["model"]["vocab"].update({"a" * 100_000: 300}),
        "more than 65,536",
    ),
    (
        "merges of 1.1 million",
        lambda c: c["model"].update(merges=["a b"] * 1_100_000),
        "merges are more than",
    ),
    ("merges that are deep", lambda c: c["model"].update(merges=[[[[1]]]]), "is not a pair"),
    ("merge of what is not there", lambda c: c["model"].update(merges=["zz zz"]), "is not in its vocabulary"),
    ("added tokens that are lists", lambda c: c.update(added_tokens=[{"content": ["x"]}] * 2), "it has no"),
    (
        "added token besides",
        lambda c: c["added_tokens"].append({"content": {"a": 1}}),
        "has added tokens besides",
    ),
    (
        "split by a pattern that never ends",
        lambda c: c.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
        ),
        "is not ByteLevel",
    ),
    ("normalizer", lambda c: c.update(normalizer={"type": "Replace"}), "its normalizer changes the text"),
]:
    attack("tokenizer", label, answer)(tokenizer_with(change))


@attack("tokenizer", "file of 10 GB", "that are allowed")
def _(folder: Path) -> Path:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(10 << 30)
    return folder


if hasattr(os, "mkfifo"):

    @attack("tokenizer", "a pipe", "is not a regular file")
    def _(folder: Path) -> Path:
        os.mkfifo(folder / "tokenizer.json")
        return folder


# Configs


def config_of(content: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "c.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / "c.yaml"

    return make


LAUGHS = "seed: &l0 [0]\n" + "\n".join(f"a{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "a0: &l0 {x0: 0}\n" + "\n".join(
    f"a{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 9)}]}}" for n in range(1, 12)
)
for label, content, answer in [
    ("billion laughs", LAUGHS, "aliases within anchors"),
    ("billion merges", MERGES, "aliases within anchors"),
    ("anchor that holds itself", "seed: &a [*a]", "aliases within anchors"),
    ("a thousand aliases", "seed: &a 1\nmodel: [" + "*a," * 1000 + "]", "or over 64"),
    ("Python object", "seed: !!python/object/apply:os.system ['touch exploded']", "could not determine"),
    ("Python name", "seed: !!python/name:os.system", "could not determine"),
    ("Python module", "!!python/module:antigravity", "could not determine"),
    ("own tag", "seed: !evil 1", "could not determine"),
    ("whole number of 5,000 hexadecimal digits", "seed: 0x" + "f" * 5000, "beyond 2^64"),
    ("key of 5,000 hexadecimal digits", "? 0x" + "f" * 5000 + "\n: 1", "beyond 2^64"),
    ("whole number of 5,000 digits", "seed: " + "9" * 5000, "not valid YAML"),
    ("10^400 as a rate", "training: {learning_rate: 1" + "0" * 400 + "}", "beyond 2^64"),
    ("1e400", "training: {learning_rate: 1e400}", "must be a finite number"),
    ("not a number", "training: {learning_rate: .nan}", "learning_rate: nan: must be"),
    ("batches of 10^308", "training: {batch_size: 1e308}", "must be below 2^63"),
    ("10^9 layers", "model: {num_layers: 1e9}", "less than or equal to 10000"),
    ("width of 2^40", "model: {hidden_size: 1099511627776, num_heads: 1}", "less than or equal to 16777216"),
    ("10^17 parameters", "model: {num_layers: 1e4, hidden_size: 1e6, num_heads: 1}", "no machine holds more"),
    (
        "context of 2^32",
        "model: {max_seq_len: 4294967296, hidden_size: 4096, num_heads: 1}",
        "no machine holds",
    ),
    ("lists 100,000 deep", "seed: " + "[" * 100_000, "nested deeper than 20"),
    ("blocks 100,000 deep", "- " * 100_000, "nested deeper than 20"),
    ("NUL", b"seed: 1\x00", "not allowed"),
    ("not UTF-8", b"seed: \xff", "not UTF-8"),
    ("UTF-16", "seed: 1".encode("utf-16"), "not UTF-8"),
    ("10 MB", "# comment\n" * 10**6, "that are allowed"),
    ("section that is a list", "model: [1]", "is a section with keys of its own"),
    ("escape codes in a key", '"\\e[31mred": 1', "unknown setting"),
    ("key of 100,000 characters", "? " + "k" * 100_000 + "\n: 1", "unknown setting"),
    ("date that does not exist", "seed: 2020-99-99", "not valid YAML"),
]:
    attack("config", label, answer)(config_of(content))
if hasattr(os, "mkfifo"):

    @attack("config", "a pipe", "is not a regular file")
    def _(folder: Path) -> Path:
        os.mkfifo(folder / "c.yaml")
        return folder / "c.yaml"


# GGUF files


def gguf_of(*parts: bytes | int, entries: int = 1, tensors: int = 0) -> Callable[[Path], Path]:
    """A header with these entries; an integer is written in 64 bits."""

    def make(folder: Path) -> Path:
        content = io.BytesIO(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries))
        content.seek(0, 2)
        for part in parts:
            content.write(struct.pack("<Q", part) if isinstance(part, int) else part)
        (folder / "m.gguf").write_bytes(content.getvalue() + bytes(64))
        return folder / "m.gguf"

    return make


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


KEY = struct.pack("<Q", 1) + b"k"
TENSOR = struct.pack("<Q", 1) + b"t"
for label, make, answer in [
    ("2^62 entries", gguf_of(entries=2**62), "it claims"),
    ("2^62 tensors", gguf_of(entries=0, tensors=2**62), "it claims"),
    ("name of 2^62 bytes", gguf_of(2**62), "claims 4,611,686,018,427,387,904 bytes"),
    ("text of 2^62 bytes", gguf_of(KEY, u32(8), 2**62), "claims 4,611,686,018,427,387,904 bytes"),
    ("list of 2^62 bytes", gguf_of(KEY, u32(9), u32(0), 2**62), "more than 4,000,000"),
    ("list of 3 million numbers that are not there", gguf_of(KEY, u32(9), u32(4), 3_000_000), "cut off"),
    ("lists of lists", gguf_of(KEY, *([u32(9), u32(9), 1] * 3)), "lists of lists"),
    ("unknown kind", gguf_of(KEY, u32(77)), "77"),
    ("tensor of 2^62 dimensions", gguf_of(TENSOR, u32(2**31), entries=0, tensors=1), "dimensions"),
    (
        "tensor of 2^124 numbers",
        gguf_of(TENSOR, u32(2), 2**62, 2**62, u32(0), 0, entries=0, tensors=1),
        "beyond the end",
    ),
    (
        "tensor beyond the end",
        gguf_of(TENSOR, u32(1), 1, u32(0), 2**62, entries=0, tensors=1),
        "beyond the end",
    ),
    (
        "tensors over each other",
        gguf_of(*([TENSOR, u32(1), 16, u32(0), 0] * 9), entries=0, tensors=9),
        "its tensors claim",
    ),
    ("type that does not exist", gguf_of(TENSOR, u32(1), 1, u32(999), 0, entries=0, tensors=1), "999"),
    ("no entries", gguf_of(entries=0), "is not a complete GGUF file"),
]:
    attack("gguf", label, answer)(make)


def gguf_with(old: bytes, new: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        content = sound_gguf()
        assert content.count(old) == 1
        (folder / "m.gguf").write_bytes(content.replace(old, new))
        return folder / "m.gguf"

    return make


def uint32_entry(key: str, value: int) -> bytes:
    return key.encode() + u32(4) + u32(value)


for label, old, new, answer in [
    ("10^9 layers", ("gpt2.block_count", 2), ("gpt2.block_count", 10**9), "less than or equal to 10000"),
    ("9,999 layers", ("gpt2.block_count", 2), ("gpt2.block_count", 9999), "is not a complete GGUF file"),
    (
        "width of 2^24",
        ("gpt2.embedding_length", 16),
        ("gpt2.embedding_length", 2**24),
        "no machine holds more",
    ),
    (
        "context of 2^31",
        ("gpt2.context_length", 32),
        ("gpt2.context_length", 2**31),
        "is not a complete GGUF",
    ),
]:
    attack("gguf", label, answer)(gguf_with(uint32_entry(*old), uint32_entry(*new)))
