"""Check an untrusted checkpoint file before Atlas uses its tensors.

No code in the file runs. Before Atlas allocates memory, it compares the claimed size with the sizes in the zip. The
file must be a zip of uncompressed records that do not overlap, so all records together are no larger than the file.
`safe_unpickle.py` reads the pickle in the zip. A tensor must fit into its record. The config must not describe a model
with more parameters than the file contains.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from atlas.config import ModelConfig
from atlas.errors import AtlasError, CheckpointError
from atlas.files import open_zip
from atlas.model.cost import count_parameters
from atlas.training.checkpoint.first_version import is_first_version, refusal
from atlas.training.checkpoint.manifest import LARGEST_COUNT, SHARED_BASE_VERSION, Count, FileEntry
from atlas.training.checkpoint.safe_unpickle import NotPlainError, Storage, TensorClaim, read_pickle
from atlas.training.optimizers.build import state_shapes

_LARGEST_PICKLE = 160 << 20  # bytes; most are the tokenizer's, if Atlas trained the BPE
_LARGEST_DIRECTORY = 64 << 20
_CHUNK = 1 << 20
_BROKEN = (zipfile.BadZipFile, OSError, ValueError, KeyError)

_Number = bool | Count | float | None


class _Contents(BaseModel):
    """The types of the values in a checkpoint. Other code checks the tensors, the config and the tokenizer.

    A key that is not a field here must have a number, a string, or a list or dict of numbers as its value.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, _Number | str | list[float] | dict[str, _Number]]
    model_state_dict: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    data: dict[str, str | int | None]
    step: Count
    sequences_consumed: Count
    horizon: Count
    optimizer_state_dict: dict[str, Any] = {}
    scaler_state_dict: dict[str, Any] = {}
    machine: dict[str, str | int | float | None] = {}
    epoch: Count = 0
    micro_batch_size: Annotated[int, Field(ge=1, le=LARGEST_COUNT)] = 1
    loss: float | None = None
    val_loss: float | None = None
    best_loss: float | None = None
    initialized_from: str | None = None
    base: FileEntry | None = None


def read_plain(path: Path, *, remedy: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a checkpoint file: plain values, and tensors on the CPU.

    The keys in `without` are left out and need no memory. Raises `CheckpointError`. If the file is damaged, the message
    ends with `remedy`.
    """
    return check_contents(read_values(path, remedy=remedy, without=without), path, remedy)


def holds_first_version(path: Path) -> bool:
    """Whether the file is a checkpoint of Atlas 1.x. No tensor is read."""
    try:
        return is_first_version(read_values(path, remedy="", names_only=True))
    except AtlasError:
        return False


def is_base(path: Path) -> bool:
    """Return whether the file has the frozen weights of a LoRA run, see `base.py`. No tensor is read."""
    try:
        contents = read_values(path, remedy="", names_only=True)
    except AtlasError:
        return False
    return isinstance(contents, dict) and contents.get("is_base") is True


def refuse_first_version(path: Path) -> None:
    """Raise `CheckpointError` if the file is a checkpoint of Atlas 1.x. The message names the command that converts the
    file."""
    if holds_first_version(path):
        raise CheckpointError(refusal(path))


def read_values(path: Path, *, remedy: str, without: Collection[str] = (), names_only: bool = False) -> Any:
    """The plain values and tensors in any file that `torch.save` wrote, even if the file is not a checkpoint. With
    `names_only`, the tensors are empty. Raises `CheckpointError` for any other file."""
    archive = _open(path, remedy)
    storages: dict[Storage, Tensor] = {}

    def build(claim: TensorClaim) -> Tensor:
        if names_only:
            return torch.empty(0)
        if not claim.is_inside:
            raise NotPlainError(f"a tensor of shape {claim.size} does not fit its storage")
        if claim.storage not in storages:
            storages[claim.storage] = _read_storage(archive, folder, claim.storage)
        storage = storages[claim.storage].untyped_storage()
        return torch.empty(0, dtype=claim.storage.dtype).set_(storage, claim.offset, claim.size, claim.stride)

    try:
        folder = _folder_of(archive)
        program = _read_record(archive, f"{folder}/data.pkl", limit=_LARGEST_PICKLE)
        return read_pickle(program, build, without=without)
    except NotPlainError as error:
        raise CheckpointError(
            f"{path}: is not a checkpoint of plain tensors, refused without running it ({error!s:.200}): "
            "take a checkpoint that atlas train wrote"
        ) from None
    except _BROKEN as error:
        raise CheckpointError(f"{path}: is damaged ({error!s:.200}): {remedy}") from None
    finally:
        archive.close()
        storages.clear()  # a reference cycle of closures would keep every tensor until garbage collection


def check_zip(path: Path, *, remedy: str) -> None:
    """Raise `CheckpointError` if a file is not a zip of uncompressed records, or if its bytes do not match the CRC-32
    checksums in the zip."""
    with _open(path, remedy) as archive:
        try:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {broken!r:.80}")
        except _BROKEN as error:
            raise CheckpointError(f"{path}: is damaged ({error!s:.200}): {remedy}") from None


def _open(path: Path, remedy: str) -> zipfile.ZipFile:
    """Open a zip. Raises `CheckpointError` unless every record in it is stored uncompressed."""
    try:
        archive = open_zip(path, directory_limit=_LARGEST_DIRECTORY)
        for member in archive.infolist():
            stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
            if not stored or member.flag_bits & 1:
                raise zipfile.BadZipFile(f"record {member.orig_filename!r:.80} is compressed or encrypted")
        if len(set(archive.namelist())) < len(archive.namelist()):
            raise zipfile.BadZipFile("it has two records of the same name")
    except _BROKEN as error:
        reason = f"is not an Atlas checkpoint, or is cut off ({error!s:.200}): {remedy}"
        if path.suffix == ".gguf":
            reason = "is a GGUF file, not a checkpoint: use it with atlas serve --gguf"
        raise CheckpointError(f"{path}: {reason}") from None
    return archive


def _folder_of(archive: zipfile.ZipFile) -> str:
    """The folder in the zip to which `torch.save` wrote all records. The name of this folder depends on the file name
    that `torch.save` got."""
    programs = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(programs) != 1:
        raise NotPlainError("it has no data.pkl, or more than one")
    folder = programs[0].split("/")[0]
    order = f"{folder}/byteorder"
    if order in archive.namelist() and _read_record(archive, order, limit=16) != sys.byteorder.encode():
        raise NotPlainError(f"its byte order differs from that of this machine ({sys.byteorder})")
    return folder


def _read_record(archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    record = archive.getinfo(name)
    if record.file_size > limit:
        raise NotPlainError(f"{name:.80} has {record.file_size:,} bytes, more than {limit:,}")
    with archive.open(record) as file:
        return b"".join(iter(lambda: file.read(_CHUNK), b""))


def _read_storage(archive: zipfile.ZipFile, folder: str, storage: Storage) -> Tensor:
    """Return a new tensor with the bytes of a storage, read in pieces. `zipfile` compares the CRC-32 checksum."""
    record = archive.getinfo(f"{folder}/data/{storage.key}")
    if record.file_size != storage.num_bytes:
        raise NotPlainError(
            f"a storage of {storage.num_bytes:,} bytes has a record of {record.file_size:,} bytes"
        )
    buffer = torch.empty(storage.num_bytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    with archive.open(record) as file:
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise EOFError(f"record {storage.key} is cut off")
    return buffer


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values in the tensors, which are on one device, are finite. NaN is both minimum and maximum of
    a tensor that contains NaN. Both together need an eighth of the time of `isfinite`, and no memory."""
    limits = [limit for tensor in tensors if tensor.numel() for limit in (tensor.amin(), tensor.amax())]
    return not limits or bool(torch.stack([limit.float() for limit in limits]).isfinite().all())


def refuse_weights_that_are_not_finite(contents: Mapping[str, Any], path: Path, remedy: str) -> None:
    """Raise `CheckpointError` if a weight in the contents of a checkpoint is NaN or infinite. Earlier versions of Atlas
    could save such a checkpoint."""
    if not are_finite(contents["model_state_dict"].values()):
        raise CheckpointError(
            f"{path}: its weights are not finite, so no training can start from them: {remedy}"
        )


def check_contents(contents: Any, path: Path, remedy: str) -> dict[str, Any]:
    """Return `contents` unchanged. Raises `CheckpointError` if they are not the contents of a checkpoint."""
    if is_first_version(contents) and "format_version" not in contents:
        raise CheckpointError(refusal(path))
    if not isinstance(contents, dict) or "format_version" not in contents:
        raise CheckpointError(
            f"{path}: holds tensors but is not an Atlas checkpoint (no format_version): take a "
            "checkpoint that atlas train wrote"
        )
    version = contents["format_version"]
    if type(version) is not int or not 1 <= version <= SHARED_BASE_VERSION:
        raise CheckpointError(
            f"{path}: has checkpoint format {version!r:.20}; this version of Atlas reads up to "
            f"{SHARED_BASE_VERSION}: update Atlas"
        )
    try:
        _Contents.model_validate(contents)
        if "model" in contents["config"]:
            ModelConfig.model_validate(contents["config"]["model"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:40] for part in first["loc"]) or "config.model"
        problem = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg']:.200}"
        raise CheckpointError(
            f"{path}: is not a complete Atlas checkpoint ({place} {problem}): {remedy}"
        ) from None
    if contents.get("base") is None:  # else the base has the other weights, see `base.py`
        refuse_missing_weights(contents, path, remedy)
    return contents


def refuse_missing_weights(contents: Mapping[str, Any], path: Path, remedy: str) -> None:
    """Raise `CheckpointError` if the config describes more parameters than there are. Otherwise Atlas would allocate
    memory for all of them."""
    if "model" not in contents["config"]:
        return
    model, weights = ModelConfig.model_validate(contents["config"]["model"]), contents["model_state_dict"]
    tensors = [tensor for tensor in weights.values() if isinstance(tensor, Tensor)]
    storages = [(tensor.untyped_storage(), tensor.itemsize) for tensor in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() // itemsize for storage, itemsize in storages}
    there, needed = sum(sizes.values()), 0 if model.vocab_size is None else count_parameters(model).total
    if model.vocab_size is None or len(tensors) < len(weights) or there < needed:
        reason = f"it needs {needed:,} parameters with a vocabulary of {model.vocab_size}, but only {there:,} are there"
        raise CheckpointError(f"{path}: its weights do not fit its config: {reason}; {remedy}")


def check_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raise `ValueError` if the parameter groups or the tensor shapes in `saved` differ from those of the optimizer.

    PyTorch loads a state without comparing shapes. The fused AdamW would then read and write beyond the end of a tensor
    that is too small.
    """
    own = optimizer.state_dict()["param_groups"]
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise ValueError("it has no parameter groups")
    if len(groups) != len(own) or not all(map(_alike, groups, own)):
        raise ValueError("its parameter groups differ from those of the optimizer")
    numbers = [number for group in groups for number in group["params"]]
    if not all(type(number) is int for number in numbers) or not states.keys() <= set(numbers):
        raise ValueError("its parameters are not numbered")
    expected = [state_shapes(group, p) for group in optimizer.param_groups for p in group["params"]]
    for number, shapes in zip(numbers, expected, strict=True):
        if states.get(number, {}) != {} and _shapes(states[number]) != shapes:
            wanted = ", ".join(f"{key} {tuple(shape)}" for key, shape in sorted(shapes.items()))
            raise ValueError(f"the state of parameter {number} does not have {wanted}")


def _shapes(state: Any, key: object = "") -> Any:
    """Replace each tensor in nested dicts by its shape. Replace a tensor of the wrong dtype, and any other value, by
    None."""
    if isinstance(state, dict):
        return {key: _shapes(value, key) for key, value in state.items()}
    if not isinstance(state, Tensor):
        return None
    is_kind = state.dtype == torch.uint8 if key == "codes" else state.is_floating_point()
    return state.shape if is_kind else None


def _alike(group: Any, own: dict[str, Any]) -> bool:
    """Whether a saved group and the optimizer's group `own` have the same number of parameters and the same settings.

    Only the settings that both groups have are compared, since other versions of PyTorch have other settings. Switches
    and strings must be equal; numbers may differ.
    """
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        return False
    settings = group.keys() & own.keys() - {"params"}
    kinds_agree = all(_kind(group[key]) == _kind(own[key]) for key in settings)
    return kinds_agree and len(group["params"]) == len(own["params"])


def _kind(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_kind(entry) for entry in value]
    if isinstance(value, (bool, str)):
        return value
    return "number" if isinstance(value, (int, float)) else type(value)
