"""The reasons why a dataset is rebuilt: all differences since the dataset was prepared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas.data.shards import MANIFEST, Manifest, is_prepared, read_manifest
from atlas.data.text.sources import Sources
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer

MOST_ROOTS = 1000
"""A manifest stores the hash of each file for up to this many files. For more files, it stores one combined hash."""
_SHOWN = 3


def what_changed(
    output: Path, sources: Sources, tokenizer: Tokenizer | None, options: Mapping[str, Any]
) -> list[str]:
    """Return a line for each difference between the dataset in `output` and the wanted dataset. The list is empty if
    `output` contains no dataset."""
    if not is_prepared(output):
        return []
    try:
        manifest = read_manifest(output / MANIFEST)
    except AtlasError as error:
        return [f"{output} is rebuilt: {error}"]
    before, now = _flat(manifest.options), _flat(options)
    differences = [
        *_text_differences(manifest, sources),
        *_tokenizer_difference(manifest, tokenizer, options["train_tokenizer"]),
        *(f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]),
    ]
    if not differences and manifest.source.get("faults") and sources.reading.on_error == "stop":
        differences = ["it lacks what cannot be read, at which --on-error stop ends"]
    return [f"{output} is rebuilt: {difference}" for difference in differences or ["it is damaged"]]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as a user writes them, without the tokenizer. The options of cleaning are on the same level as
    all other options."""
    flat = {name: value for name, value in options.items() if name not in ("cleaning", "train_tokenizer")}
    for name, value in (options.get("cleaning") or {}).items():
        flat |= {"clean": ",".join(value) or "none"} if name == "steps" else {name: value}
    return flat


def roots_to_keep(sources: Sources) -> dict[str, str]:
    """Return the name → hash of each given file, for a later comparison. The dict is empty for more than `MOST_ROOTS`
    files."""
    return sources.roots if len(sources.roots) <= MOST_ROOTS else {}


def _text_differences(manifest: Manifest, sources: Sources) -> list[str]:
    before, now = manifest.source.get("roots"), roots_to_keep(sources)
    if not isinstance(before, dict) or not before or not now:
        changed = manifest.source.get("content_key") != sources.content_key
        return ["its text changed"] if changed else []
    differences = [
        *(f"{name} is new" for name in now if name not in before),
        *(f"{name} is gone" for name in before if name not in now),
        *(f"{name} changed" for name in now if name in before and before[name] != now[name]),
    ]
    more = len(differences) - _SHOWN
    return differences if more <= 0 else [*differences[:_SHOWN], f"{more} more files differ"]


def _tokenizer_difference(manifest: Manifest, tokenizer: Tokenizer | None, wanted: int | None) -> list[str]:
    before = manifest.options.get("train_tokenizer")
    was = f"one of {before:,} tokens, trained on the text" if before else str(manifest.tokenizer["name"])
    if tokenizer is None:
        return [] if before == wanted else [f"the tokenizer was {was}, is trained with {wanted:,} tokens"]
    if before is None and manifest.tokenizer["fingerprint"] == tokenizer.fingerprint:
        return []
    return [f"the tokenizer was {was}, is {tokenizer!r}"]
