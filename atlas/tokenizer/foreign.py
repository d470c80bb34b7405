"""A tokenizer.json of another model, such as Llama or Qwen. Hugging Face's library `tokenizers` runs this file.

A model can be trained with such a tokenizer. Checkpoints and Hugging Face folders can contain the tokenizer, and a GGUF
file too if llama.cpp knows its split.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as HFTokenizer

from atlas.errors import AtlasError, TokenizerError
from atlas.files import read_limited
from atlas.tokenizer.base import MAX_FILE_BYTES
from atlas.tokenizer.byte_level import BYTE_OF_CHAR, HFTokenizerBase, token_bytes


class SpecialTokens(NamedTuple):
    """Ids of the tokens with a meaning, or None."""

    bos: int | None = None
    """Begins a text."""
    eos: int | None = None
    """What chat templates call the end of a text. In a chat model it ends an answer."""
    pad: int | None = None
    unk: int | None = None
    stops: tuple[int, ...] = ()
    """Each of these ends a text or an answer."""
    adds_bos: bool = False
    """Whether a model expects `bos` at the beginning of a prompt."""

    @classmethod
    def from_state(cls, state: Any) -> SpecialTokens:
        """Return the special tokens in the state of a tokenizer. Earlier versions did not store them."""
        if not isinstance(state, dict):
            return cls()
        ids = {name: _ids(state.get(name))[:1] for name in ("bos", "eos", "pad", "unk")}
        bos, eos, pad, unk = (found[0] if found else None for found in ids.values())
        return cls(bos, eos, pad, unk, tuple(_ids(state.get("stops"))), state.get("adds_bos") is True)


def _ids(value: Any) -> list[int]:
    """Return the ids in a field that is an id or a list of ids."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [id for id in values if type(id) is int and id >= 0]


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file is missing or holds something else."""
    try:
        content = json.loads(read_limited(path, limit=MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class ForeignTokenizer(HFTokenizerBase):
    """A tokenizer from `text`, the content of a tokenizer.json. `vocab_size` can exceed the number of tokens, as in a
    model with unused embedding rows. `special` names its tokens with a meaning."""

    kind = name = "hf"

    def __init__(
        self, text: str, *, eos_id: Any, vocab_size: Any, special: SpecialTokens | None = None, origin: str
    ) -> None:
        if type(eos_id) is not int or type(vocab_size) is not int:
            raise TokenizerError(f"{origin}: has no eos_id or vocab_size; the file is damaged or was edited")
        try:
            self.hf = HFTokenizer.from_str(text)
        except Exception as error:  # the library may raise anything for a broken file
            raise TokenizerError(f"{origin}: is not a tokenizer.json: {error!s:.200}") from None
        self.hf.no_truncation()
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # special tokens in a text are plain text
        self._text = text
        self.special = special or SpecialTokens()
        self.eos_id = eos_id
        tokens = max(self.hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = vocab_size
        if not 0 <= eos_id < tokens <= vocab_size:
            raise TokenizerError(
                f"{origin}: has {tokens:,} tokens, which does not fit vocab_size {vocab_size:,} and "
                f"eos_token_id {eos_id:,}: are both files from the same model?"
            )

    @classmethod
    def from_file(cls, path: Path, refusal: AtlasError) -> ForeignTokenizer:
        """Read a tokenizer.json, and `eos_id` and `vocab_size` from the config.json beside it. Raises `refusal` if that
        config.json is missing or incomplete."""
        config = _read_object(path.with_name("config.json"))
        ends, rows = _ids(config.get("eos_token_id")), config.get("vocab_size")
        if not ends or type(rows) is not int:
            raise refusal
        text = read_limited(path, limit=MAX_FILE_BYTES).decode("utf-8-sig")
        # Each id in a list ends a text; Atlas uses the first id.
        tokenizer = cls(text, eos_id=ends[0], vocab_size=rows, origin=str(path))
        tokenizer.special = tokenizer._special_tokens(path.parent, config)
        return tokenizer

    def _special_tokens(self, folder: Path, config: dict[str, Any]) -> SpecialTokens:
        """Return what the files beside the tokenizer.json say about its special tokens."""
        generation = _read_object(folder / "generation_config.json")
        named = _read_object(folder / "tokenizer_config.json")

        def id_of(name: str) -> int | None:
            token = named.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            id = self.hf.token_to_id(text) if isinstance(text, str) else None
            return next((id for id in [id, *_ids(config.get(f"{name}_token_id"))] if id is not None), None)

        bos, eos = id_of("bos"), id_of("eos")
        ends = [*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id")), *_ids(eos)]
        starts = self.hf.encode("a").ids[:1]
        stops = tuple(dict.fromkeys(id for id in ends if id < self.vocab_size))
        adds_bos = bos is not None and (starts == [bos] or named.get("add_bos_token") is True)
        return SpecialTokens(bos, eos, id_of("pad"), id_of("unk"), stops, adds_bos)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text or an answer."""
        return frozenset([self.eos_id, *self.special.stops])

    @property
    def begin_ids(self) -> list[int]:
        """The ids that the model expects before a text: none, or the token that begins a text."""
        bos = self.special.bos
        return [bos] if self.special.adds_bos and bos is not None else []

    @cached_property
    def special_strings(self) -> dict[str, int]:
        """The special tokens, as a chat template writes them → their ids."""
        return {added["content"]: added["id"] for added in self._added if added["special"]}

    @cached_property
    def without_blanks_after(self) -> frozenset[str]:  # type: ignore[override]
        """Special tokens after which blanks are no part of the text."""
        return frozenset(added["content"] for added in self._added if added["special"] and added["rstrip"])

    def named_tokens(self) -> dict[str, str]:
        """Return `bos`, `eos` and so on → the special token with this meaning, for chat templates."""
        eos = self.eos_id if self.special.eos is None else self.special.eos
        ids = {"bos": self.special.bos, "eos": eos, "pad": self.special.pad, "unk": self.special.unk}
        return {name: self.hf.id_to_token(id) or "" for name, id in ids.items() if id is not None}

    @property
    def _added(self) -> list[dict[str, Any]]:
        added: list[dict[str, Any]] = self.content.get("added_tokens") or []
        return added

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return self.hf.decode(ids, skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token."""
        token = self.hf.id_to_token(id) or ""
        if "ByteLevel" in self._decoder and BYTE_OF_CHAR.keys() >= set(token):
            return token_bytes(token)
        if "ByteFallback" in self._decoder and (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(byte[1])
        # Decode the token in the middle of a text, since some decoders remove the blank at the beginning of a text.
        return self.decode([id, id]).removeprefix(self.decode([id])).encode("utf-8")

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of the tokenizer.json."""
        content: dict[str, Any] = json.loads(self._text)
        return content

    @property
    def is_nfc(self) -> bool:
        """Whether the tokenizer first converts a text to Unicode's NFC."""
        return "NFC" in self._steps("normalizer", "normalizers")

    @cached_property
    def _decoder(self) -> frozenset[str]:
        return self._steps("decoder", "decoders")

    def _steps(self, part: str, steps: str) -> frozenset[str]:
        """Return the types of the steps in a part of the tokenizer.json."""
        whole = self.content.get(part) or {}
        return frozenset(step.get("type") for step in (whole, *whole.get(steps, ())))

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the tokenizer.json and the sizes."""
        identity = json.dumps([self.content, self.eos_id, self.vocab_size], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """Return the state of the base class, the content of the tokenizer.json, and the special tokens."""
        return super().state() | {"json": self._text, "special": self.special._asdict()}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self._text, encoding="utf-8", newline="\n")
