"""Encoded batches → the two splits. Duplicates are left out, and held-out documents go to `val`.

All decisions that depend on the order of documents are made here, so any number of workers gives the same shards. A
document in several parts is written part by part. If the end of a document shows that the document must be left out,
the split is truncated to the position where the document began.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.data.prepare.batching import Batch
from atlas.data.prepare.cleaning import Cleaning, digest_of
from atlas.data.prepare.dedup import SeenDigests, SeenSignatures
from atlas.data.prepare.shard_writer import Extent, SplitWriter
from atlas.data.prepare.split import Part, SplitRule
from atlas.data.prepare.tokenize import Encoded
from atlas.data.prepare.workspace import Workspace
from atlas.data.shards import SplitRecord, StepRecord

SPLITS = ("train", "val")


@dataclass
class _OpenDocument:
    """A document with more parts to come. `before` is the extent of each split when the document began."""

    before: Mapping[str, Iterable[int]]
    split: str
    digest: str
    num_chars: int = 0
    changed: list[str] = field(default_factory=list)
    signature: list[int] | None = None


class Merger:
    """Writes the splits in `workspace`. If a state that `sync` returned was committed, the merger resumes from that
    state."""

    def __init__(
        self,
        workspace: Workspace,
        rule: SplitRule,
        cleaning: Cleaning,
        dtype: np.dtype[Any],
        shard_tokens: int,
    ) -> None:
        state = workspace.state.get("assembly", {})
        self.rule, self.cleaning = rule, cleaning
        # If the split rule has cuts, the rule has already left out and counted short documents. Half of a document may
        # be empty, so the merger does not check the length of a half.
        self._checks_length = rule.cuts is None
        self._min_chars = max(1, cleaning.min_chars) if self._checks_length else 1
        near = ["near_duplicates"] if cleaning.near_dedup else []
        cleaned = state.get("cleaned") or {step: {} for step in (*cleaning.steps, "short", *near)}
        self.cleaned = {step: StepRecord(**record) for step, record in cleaned.items()}
        if rule.copies and not state:
            self._count("duplicates", len(rule.copies), rule.copied_chars)
        if rule.short and not state:
            self._count("short", len(rule.short), rule.short_chars)
        folder, work, splits = workspace.dataset, workspace.folder, state.get("splits", {})
        self.writers = {
            name: SplitWriter(folder, work, name, dtype, shard_tokens, splits.get(name)) for name in SPLITS
        }
        self.seen = SeenDigests(work / "seen.bin", count=state.get("seen", 0))
        self.similar = SeenSignatures(work / "similar.bin", count=state.get("similar", 0)) if near else None
        self._document = _OpenDocument(**state["document"]) if state.get("document") else None

    @property
    def tokens(self) -> int:
        """Number of tokens in both splits."""
        return sum(writer.extent.tokens for writer in self.writers.values())

    def add(self, batch: Batch, encoded: Encoded) -> bool:
        """Merge the next batch. Returns whether the batch finished a shard."""
        if batch.is_complete:
            self._add_documents(batch.parts, encoded)
        else:
            self._add_part(batch.parts[0], encoded)
        if self._document:  # the open document may have to be removed again
            return False
        finished = [writer.finish_full_shards() for writer in self.writers.values()]
        return any(finished)

    def sync(self) -> dict[str, Any]:
        """Flush everything to the disk. Returns the state from which a `Merger` resumes."""
        return {
            "splits": {name: writer.sync() for name, writer in self.writers.items()},
            "seen": self.seen.sync(),
            "similar": self.similar.sync() if self.similar else 0,
            "cleaned": {step: record.model_dump() for step, record in self.cleaned.items()},
            "document": vars(self._document) if self._document else None,
        }

    def finish(self) -> dict[str, SplitRecord]:
        """Finish the splits. Returns the name → record of each split that is not empty."""
        records = {name: writer.finish() for name, writer in self.writers.items()}
        return {name: record for name, record in records.items() if record}

    def close(self) -> None:
        """Close the files with the digests and signatures of documents."""
        self.seen.close()
        if self.similar:
            self.similar.close()

    def _add_documents(self, parts: list[Part], encoded: Encoded) -> None:
        self._document = None  # after a cut, the first half of a document is still open here
        for step, (documents, characters) in encoded.changes.items():
            self._count(step, documents, characters)
        keep = encoded.num_chars >= self._min_chars
        if self._checks_length:
            self._drop("short", encoded, keep, np.flatnonzero(~keep))
        if "duplicates" in self.cleaning.steps and self.rule.cuts is None:  # else the rule has left them out
            candidates = np.flatnonzero(keep)
            digests = np.frombuffer(encoded.digests, dtype="V16")[candidates].tobytes()
            self._drop("duplicates", encoded, keep, candidates[~self.seen.add(digests)])
        if self.similar and encoded.signatures:
            near = [i for i in np.flatnonzero(keep) if not self.similar.add(encoded.signatures[i])]
            self._drop("near_duplicates", encoded, keep, np.array(near, dtype=np.int64))
        if self.rule.cuts is None:
            held_out = self.rule.holds_out(encoded.digests)
        else:
            held_out = np.array([part.split == "val" for part in parts], dtype=bool)
        for name, chosen in (("train", keep & ~held_out), ("val", keep & held_out)):
            lengths = encoded.lengths[chosen]
            tokens = encoded.tokens[np.repeat(chosen, encoded.lengths)]
            num_bytes = int(encoded.num_bytes[chosen].sum())
            self.writers[name].append(tokens, np.cumsum(lengths) - lengths, num_bytes)

    def _drop(self, step: str, encoded: Encoded, keep: NDArray[np.bool_], places: NDArray[np.int64]) -> None:
        keep[places] = False
        self._count(step, len(places), int(encoded.num_chars[places].sum()))

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
            if dropped_by := self._step_that_drops(document):
                if dropped_by != "short" or self._checks_length:
                    self._count(dropped_by, 1, document.num_chars)
                for name, extent in document.before.items():
                    self.writers[name].truncate(Extent(*extent))
            self._document = None

    def _step_that_drops(self, document: _OpenDocument) -> str | None:
        if document.num_chars < self._min_chars:
            return "short"
        checks_copies = "duplicates" in self.cleaning.steps and self.rule.cuts is None
        if checks_copies and not self.seen.add(bytes.fromhex(document.digest))[0]:
            return "duplicates"
        if self.similar and not self.similar.add(np.array(document.signature or (), dtype=np.uint32)):
            return "near_duplicates"
        return None

    def _count(self, step: str, documents: int, characters: int) -> None:
        self.cleaned[step].documents += documents
        self.cleaned[step].characters += characters
