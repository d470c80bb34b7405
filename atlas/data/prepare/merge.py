"""Encoded batches → the two splits: what was met before is left out, what is held out goes to `val`.

All that decides about a document is in the order in which they come, so that any number of workers gives the
same shards. A document that comes in several parts is written as it comes, and taken back if it turns out, at
its end, to be one that is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.data.prepare.batching import Batch
from atlas.data.prepare.cleaning import Cleaning, digest_of
from atlas.data.prepare.dedup import SeenDigests, SeenSignatures
from atlas.data.prepare.shard_writer import Extent, SplitWriter
from atlas.data.prepare.split import Part, SplitRule
from atlas.data.prepare.tokenize import Encoded
from atlas.data.shards import ShardRecord, SplitRecord, StepRecord

SPLITS = ("train", "val")


@dataclass
class _OpenDocument:
    """One of which parts are still to come. `before` is what the splits held when it began."""

    before: dict[str, Extent]
    split: str
    digest: str = ""
    num_chars: int = 0
    changed: list[str] = field(default_factory=list)
    signature: list[int] | None = None


class Merger:
    """The splits as far as they are written. `state` is plain values, from which another process goes on."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        rule: SplitRule,
        cleaning: Cleaning,
        dtype: np.dtype[Any],
        shard_tokens: int,
        *,
        state: dict[str, Any] | None = None,
    ) -> None:
        state = state or {}
        self.rule, self.cleaning = rule, cleaning
        # With a cut the rule has left out what is short, and counted it: a half of a document, which may be empty, is
        # not to be judged again.
        self._judges_length = rule.cut_at is None
        self._min_chars = max(1, cleaning.min_chars) if self._judges_length else 1
        self.cleaned = {
            step: StepRecord(**record)
            for step, record in state.get("cleaned", _nothing_yet(cleaning)).items()
        }
        if rule.copies and not state:
            self._count("duplicates", len(rule.copies), rule.copied_chars)
        if rule.short and not state:
            self._count("short", len(rule.short), rule.short_chars)
        splits = state.get("splits", {})
        self.writers = {
            name: SplitWriter(folder, work, name, dtype, shard_tokens, **_resumed(splits.get(name)))
            for name in SPLITS
        }
        self.seen = SeenDigests(work / "seen.bin", count=state.get("seen", 0))
        self.similar = (
            SeenSignatures(work / "similar.bin", count=state.get("similar", 0))
            if cleaning.near_dedup
            else None
        )
        document = state.get("document")
        self._document = _OpenDocument(**document) if document else None
        if self._document:
            self._document.before = {name: Extent(*held) for name, held in self._document.before.items()}

    @property
    def tokens(self) -> int:
        return sum(writer.extent.tokens for writer in self.writers.values())

    def add(self, batch: Batch, encoded: Encoded) -> bool:
        """Take in the next batch; whether a shard was finished."""
        if batch.is_whole:
            self._add_documents(batch.parts, encoded)
        else:
            self._add_part(batch.parts[0], encoded)
        if self._document:  # it may have to be taken back
            return False
        finished = [writer.finish_full_shards() for writer in self.writers.values()]
        return any(finished)

    @property
    def left_out(self) -> dict[str, StepRecord]:
        """The steps that left out whole documents."""
        steps = ("short", "duplicates", "near_duplicates")
        return {
            step: self.cleaned[step]
            for step in steps
            if step in self.cleaned and self.cleaned[step].documents
        }

    def sync(self) -> dict[str, Any]:
        """Bring everything to the disk; the state that it stands for."""
        for writer in self.writers.values():
            writer.sync()
        return {
            "splits": {
                name: {"extent": writer.extent, "shards": [shard.model_dump() for shard in writer.shards]}
                for name, writer in self.writers.items()
            },
            "seen": self.seen.sync(),
            "similar": self.similar.sync() if self.similar else 0,
            "cleaned": {step: record.model_dump() for step, record in self.cleaned.items()},
            "document": vars(self._document) if self._document else None,
        }

    def finish(self) -> dict[str, SplitRecord]:
        records = {name: writer.finish() for name, writer in self.writers.items()}
        return {name: record for name, record in records.items() if record}

    def close(self) -> None:
        for file in (*self.writers.values(), self.seen, self.similar):
            if file:
                file.close()

    def _add_documents(self, parts: list[Part], encoded: Encoded) -> None:
        self._document = None  # one that was cut in two has no end of its own
        for step, (documents, characters) in encoded.changes.items():
            self._count(step, documents, characters)
        keep = encoded.num_chars >= self._min_chars
        if self._judges_length:
            self._leave_out("short", encoded, ~keep)
        digests = np.frombuffer(encoded.digests, dtype="V16")
        if self.cleaning.drops_duplicates:
            candidates = np.flatnonzero(keep)
            again = candidates[~self.seen.add(digests[candidates].tobytes())]
            keep[again] = False
            self._leave_out("duplicates", encoded, again)
        if self.similar and encoded.signatures:
            near = [i for i in np.flatnonzero(keep) if not self.similar.add(encoded.signatures[i])]
            keep[near] = False
            self._leave_out("near_duplicates", encoded, np.array(near, dtype=np.int64))
        if self.rule.cut_at is None:
            held_out = self.rule.holds_out(encoded.digests)
        else:
            held_out = np.array([part.split == "val" for part in parts], dtype=bool)
        for name, chosen in (("train", keep & ~held_out), ("val", keep & held_out)):
            lengths = encoded.lengths[chosen]
            tokens = encoded.tokens[np.repeat(chosen, encoded.lengths)]
            num_bytes = int(encoded.num_bytes[chosen].sum())
            self.writers[name].append(tokens, np.cumsum(lengths) - lengths, num_bytes)

    def _add_part(self, part: Part, encoded: Encoded) -> None:
        if part.starts_document or self._document is None:
            held_out = bool(self.rule.holds_out(encoded.digests)[0])
            split = part.split or ("val" if held_out else "train")
            before = {name: writer.extent for name, writer in self.writers.items()}
            self._document = _OpenDocument(before, split, encoded.digests.hex())
        else:
            chained = bytes.fromhex(self._document.digest) + encoded.digests
            self._document.digest = digest_of(chained).hex()
        document = self._document
        document.num_chars += int(encoded.num_chars[0])
        for step, (_, characters) in encoded.changes.items():
            self._count(step, step not in document.changed, characters)
            document.changed.append(step)
        if encoded.signatures:
            known = document.signature or encoded.signatures[0]
            document.signature = np.minimum(known, encoded.signatures[0]).tolist()
        starts = np.zeros(int(part.starts_document), dtype=np.int64)
        self.writers[document.split].append(encoded.tokens, starts, int(encoded.num_bytes[0]))
        if part.ends_document:
            if reason := self._reason_to_leave_out(document):
                if reason != "short" or self._judges_length:
                    self._count(reason, 1, document.num_chars)
                for name, extent in document.before.items():
                    self.writers[name].cut_back(extent)
            self._document = None

    def _reason_to_leave_out(self, document: _OpenDocument) -> str | None:
        if document.num_chars < self._min_chars:
            return "short"
        if self.cleaning.drops_duplicates and not self.seen.add(bytes.fromhex(document.digest))[0]:
            return "duplicates"
        signature = np.array(document.signature or (), dtype=np.uint32)
        if self.similar and not self.similar.add(signature):
            return "near_duplicates"
        return None

    def _leave_out(self, step: str, encoded: Encoded, which: NDArray[Any]) -> None:
        gone = encoded.num_chars[which]
        self._count(step, len(gone), int(gone.sum()))

    def _count(self, step: str, documents: int, characters: int) -> None:
        record = self.cleaned.setdefault(step, StepRecord())
        record.documents += documents
        record.characters += characters


def _nothing_yet(cleaning: Cleaning) -> dict[str, dict[str, int]]:
    near = ["near_duplicates"] if cleaning.near_dedup else []
    return {step: {} for step in (*cleaning.steps, "short", *near)}


def _resumed(state: dict[str, Any] | None) -> dict[str, Any]:
    if state is None:
        return {}
    shards = [ShardRecord(**shard) for shard in state["shards"]]
    return {"extent": Extent(*state["extent"]), "shards": shards}
