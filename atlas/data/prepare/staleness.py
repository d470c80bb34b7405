"""Why a dataset is rebuilt: what differs from the time when it was prepared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atlas.data.shards import MANIFEST, Manifest, is_prepared, read_manifest
from atlas.data.text.sources import Sources
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer

MOST_ROOTS = 1000
"""A manifest keeps the hashes of up to so many files one by one, else one hash of all."""
_SHOWN = 3


def what_changed(
    output: Path, sources: Sources, tokenizer: Tokenizer | None, options: Mapping[str, Any]
) -> list[str]:
    """A line for each difference between the dataset in `output` and the wanted one. Empty if there is no dataset."""
    if not is_prepared(output):
        return []
    try:
        manifest = read_manifest(output / MANIFEST)
    except AtlasError as error:
        return [f"{output} is rebuilt: {error}"]
    differences = [
        *_text_differences(manifest, sources),
        *_tokenizer_difference(manifest, tokenizer, options),
        *_option_differences(manifest.options, options),
    ]
    return [f"{output} is rebuilt: {difference}" for difference in differences or ["it is damaged"]]


def _option_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    before, now = _flat(before), _flat(now)
    for name, value in now.items():
        if name != "train_tokenizer" and before.get(name) != value:
            yield f"{name} was {before.get(name)}, is {value}"


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with those of cleaning beside the others and as a user writes them."""
    cleaning = options.get("cleaning") or {}
    named = {"clean" if name == "steps" else name: value for name, value in cleaning.items()}
    if "clean" in named:
        named["clean"] = ",".join(named["clean"]) or "none"
    return {name: value for name, value in options.items() if name != "cleaning"} | named


def roots_to_keep(sources: Sources) -> dict[str, str]:
    """Name → hash of each given file, which a manifest keeps for a later comparison."""
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


def _tokenizer_difference(
    manifest: Manifest, tokenizer: Tokenizer | None, options: Mapping[str, Any]
) -> list[str]:
    before = manifest.options.get("train_tokenizer")
    was = f"one of {before:,} tokens, trained on the text" if before else str(manifest.tokenizer["name"])
    if tokenizer is None:
        wanted = options["train_tokenizer"]
        return [] if before == wanted else [f"the tokenizer was {was}, is trained with {wanted:,} tokens"]
    if before is None and manifest.tokenizer["fingerprint"] == tokenizer.fingerprint:
        return []
    return [f"the tokenizer was {was}, is {tokenizer!r}"]
