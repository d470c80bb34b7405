"""Sharded checkpoints: a folder in which each rank writes its own part, for states that no rank holds whole.

`atlas_step_100/` holds the tensors as PyTorch's Distributed Checkpoint writes them, in safetensors files (its usual
format keeps a pickle beside them, and Atlas reads none), and `state.json` with everything else. It is a checkpoint if a
sidecar, `atlas_step_100.json` beside it, names the folder and each file with its size and sha256; `atlas_best.json` may
name the same folder.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from atlas.errors import AtlasError
from atlas.files import flush_folder, read_limited, sha256_of
from atlas.training.checkpoint import CheckpointManager, load_checkpoint
from atlas.training.distributed import World, has_joined, whole
from atlas.training.manifest import STATE_FILE, FileEntry, read_manifest, sidecar_of
from atlas.training.untrusted import check_contents
from atlas.training.writing import commit, tensor_bytes, write_tensors

# One process may save and read shards, too, and PyTorch need not say each time that there are no others.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_LARGEST_STATE = 160 << 20
_SLOW_DISK = 100e6  # bytes a second


def split(contents: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts and lists → the same for JSON, each tensor being `{"tensor": its name}`, and the tensors by name.
    Those of a single number, such as an optimizer's count of steps, are written out."""
    if isinstance(contents, Tensor):
        if contents.dim():
            return {"tensor": name}, {name: contents}
        number = whole(contents)
        return {"number": number.item(), "dtype": str(number.dtype).removeprefix("torch.")}, {}
    tensors: dict[str, Tensor] = {}
    if isinstance(contents, Mapping):
        pairs = {}
        for key, value in contents.items():
            pairs[f"#{key}" if isinstance(key, int) else key], found = split(
                value, f"{name}/{key}".lstrip("/")
            )
            tensors |= found
        return {"dict": pairs}, tensors
    if isinstance(contents, (list, tuple)):
        items = []
        for place, value in enumerate(contents):
            item, found = split(value, f"{name}/{place}")
            items.append(item)
            tensors |= found
        return {"list": items}, tensors
    return {"value": contents}, tensors


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` took apart. Raises `ValueError` for what it did not write."""
    match plain:
        case {"value": value} if value is None or isinstance(value, (bool, int, float, str)):
            return value
        case {"number": bool() | int() | float() as number, "dtype": str(dtype)}:
            kind = getattr(torch, dtype, None)
            if isinstance(kind, torch.dtype):
                return torch.tensor(number, dtype=kind)
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"list": list(items)}:
            return [join(item, tensors) for item in items]
        case {"dict": dict(pairs)}:
            return {int(key[1:]) if key.startswith("#") else key: join(pairs[key], tensors) for key in pairs}
    raise ValueError(f"{plain!s:.100} is not a part of a checkpoint")


def read_shards(folder: Path, *, remedy: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a sharded checkpoint, its tensors whole and on the CPU. Raises `AtlasError`.

    What the keys `without` name is left out, and no memory is taken for it.
    """
    try:
        plain = json.loads(read_limited(folder / STATE_FILE, limit=_LARGEST_STATE))
        pairs = {key: value for key, value in plain["dict"].items() if key not in without}
        metadata: Mapping[str, Any] = (
            HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        )
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if name.split("/")[0] not in without
        }
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        contents = join({"dict": pairs}, tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, CheckpointException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AtlasError(
            f"{folder}: is damaged, or no sharded checkpoint ({reason:.200}): {remedy}"
        ) from None
    return check_contents(contents, folder, remedy)


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's part of a sharded checkpoint, each tensor sharded as its parameter is; every rank must call it.
    Raises `ValueError` for a state that is not there, or another optimizer's."""
    key = "optimizer_state_dict"
    plain = json.loads(read_limited(folder / STATE_FILE, limit=_LARGEST_STATE))["dict"].get(key, {"dict": {}})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    metadata: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in metadata.items():
        if not name.startswith(f"{key}/state/"):
            continue
        number = int(name.split("/")[2])
        dtype = entry.properties.dtype
        if number < len(parameters) and parameters[number].shape == entry.size:
            tensors[name] = torch.zeros_like(parameters[number], dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not has_joined())
    return join(plain, tensors)  # type: ignore[no-any-return]


def consolidate(source: Path, target: Path, *, say: Callable[[str], None]) -> int:
    """Write the contents of `source` to one file with a sidecar of its own; its bytes. Raises `AtlasError`."""
    if target.suffix != ".pt":
        raise AtlasError(f"{target}: name a file that ends with .pt")
    if taken := next((path for path in (target, sidecar_of(target)) if path.exists()), None):
        raise AtlasError(f"{taken}: exists: name another file")
    contents, manifest = load_checkpoint(source, say=say), read_manifest(source, check_hash=False)
    staged = target.with_name(target.name + ".tmp")
    try:
        size, sha256 = write_tensors(staged, contents)
        entry = FileEntry(name=target.name, size=size, sha256=sha256)
        if manifest:
            commit(staged, target, manifest.model_copy(update={"folder": None, "files": (entry,)}))
        else:
            os.replace(staged, target)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise AtlasError(f"{target}: cannot be written ({error.strerror}): name another place") from None
    return size


class ShardSaver:
    """Saves sharded checkpoints, one at a time; every rank must call each method. As `BackgroundSaver` otherwise.

    With `in_background` the ranks copy their shards to main memory and write them while training goes on.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        world: World,
        *,
        in_background: bool,
        before: Callable[[], None],
        after: Callable[[list[Path], int, float], None],
    ) -> None:
        self.checkpoints = checkpoints
        self.world = world
        self.in_background = in_background
        self.before = before
        self.after = after
        self.written: list[Path] = []
        self.seconds = self.stall = 0.0
        # What the saving threads tell one another must not come between what the training threads do.
        patience = timedelta(seconds=world.timeout)
        self._group = dist.new_group(backend="gloo", timeout=patience) if has_joined() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> ShardSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.join()

    def hold(self, contents: Mapping[str, Any]) -> None:
        """Nothing: a state that is in shards is gone back to on the disk."""

    def last_good(self) -> dict[str, Any] | None:
        self.join()
        latest = self.checkpoints.load_latest()
        return latest and latest[1]

    def expected_seconds(self, num_bytes: int) -> float:
        """How long a save takes: as long as the last one, or for `num_bytes` at the rate of a slow disk."""
        return self.seconds or num_bytes / _SLOW_DISK

    def save(
        self, contents: Mapping[str, Any], kinds: list[str], manifest: dict[str, Any], *, wait: bool
    ) -> None:
        """Save `contents`, its tensors in shards, under the names of `kinds`. A regular step save is skipped if the
        previous save is still being written, unless `wait` is set; every other kind waits for it."""
        begin = time.perf_counter()
        is_writing = self._thread is not None and self._thread.is_alive()
        if self.world.any(is_writing) and kinds == ["step"] and not wait:
            self.checkpoints.say(
                f"step {manifest['step']}: no checkpoint saved: the one before is still being written"
            )
            return
        self.join()
        plain, tensors = split(contents)
        staged = self.checkpoints.folder / f"atlas_step_{manifest['step']}.tmp"
        room = self.world.tell(
            self.checkpoints.begin_shards(staged, tensor_bytes(tensors), manifest["step"])
            if self.world.is_first
            else None
        )
        if not room:
            return
        writer = HuggingFaceStorageWriter(str(staged), save_distributed=True)
        alone = self._group is None

        def finish(wait_for: Callable[[], Any]) -> None:
            try:
                wait_for()
                if self.world.is_first:
                    self.before()
                    (staged / STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
                    files = tuple(_entry(path) for path in sorted(staged.iterdir()))
                    flush_folder(staged)
                    self.written = self.checkpoints.commit_shards(staged, kinds, manifest, files)
                self.seconds = time.perf_counter() - begin
                if self.world.is_first:
                    self.after(self.written, manifest["step"], self.seconds)
            except (OSError, CheckpointException) as error:
                reason = str(error).strip().splitlines()[-1]
                self.checkpoints.say(f"no checkpoint saved: {reason:.200}; the ones that are there stay")
                self.written = []
            except BaseException as error:  # a bug; it belongs to the training thread, which raises it
                self._error = error

        if self.in_background:
            future: Any = async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
            self._thread = threading.Thread(
                target=finish, args=(future.result,), name="atlas-save", daemon=True
            )
            self._thread.start()
        else:
            finish(lambda: save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone))
        if wait or not self.in_background:
            self.join()
        self.stall = time.perf_counter() - begin

    def join(self) -> None:
        """Wait for the save in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _entry(path: Path) -> FileEntry:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=sha256_of(path))
