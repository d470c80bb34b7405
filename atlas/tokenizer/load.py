"""Constructors of tokenizers: by name, from a file, from stored state, by training, or around the user's object.

This module adds the constructors to `Tokenizer`, such as `Tokenizer.gpt2()`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas.config.user_code import names_tokenizer_code
from atlas.errors import TokenizerError
from atlas.files import read_limited
from atlas.tokenizer.base import MAX_FILE_BYTES, STORED_AS_FILE, Tokenizer
from atlas.tokenizer.bpe import BPETokenizer, NotGPT2s, train_bpe
from atlas.tokenizer.chat import CHAT_FORMAT, CHAT_TEMPLATE
from atlas.tokenizer.chat_template import read_chat_template
from atlas.tokenizer.custom import CustomTokenizer, import_object
from atlas.tokenizer.foreign import ForeignTokenizer, SpecialTokens
from atlas.tokenizer.gpt2 import gpt2_tokenizer


def load(path: str | Path) -> Tokenizer:
    """Return the tokenizer in a `tokenizer.json`, in a folder with that file, or in a prepared dataset."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.name == "tokenizer.json" and path.with_name("dataset.json").is_file():
        return from_state(_state_in_dataset(path.parent))
    tokenizer: Tokenizer
    try:
        tokenizer = BPETokenizer.from_file(path)
    except NotGPT2s as refusal:
        tokenizer = ForeignTokenizer.from_file(path, refusal)
    return with_chat_template(tokenizer, read_chat_template(path.parent))


def with_chat_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """Return a tokenizer with a chat template, unless it has one."""
    if template is None or tokenizer.chat_template is not None:
        return tokenizer
    other: Tokenizer = object.__new__(type(tokenizer))  # `copy` would pickle it, and GPT-2's exists only once
    other.__dict__.update(tokenizer.__dict__, chat_template=template)
    return other


def from_checkpoint(contents: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a checkpoint, with the model's chat template."""
    return with_chat_template(from_state(contents["tokenizer"]), chat_template_of(contents))


def chat_template_of(contents: Mapping[str, Any]) -> str | None:
    """Return the chat template of the model in a checkpoint, or None. Earlier versions stored it beside the
    tokenizer."""
    data = contents.get("data") or {}
    earlier = CHAT_TEMPLATE if data.get("chat_form") == CHAT_FORMAT else data.get("chat_template")
    template = contents["tokenizer"].get("chat_template", earlier)
    return template if isinstance(template, str) else None


def from_state(state: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that `state` describes, after a check of its fingerprint.

    The function imports no code. A file does not contain the code of a custom tokenizer, so the user must name that
    tokenizer.
    """
    kind, name, text = map(state.get, ("kind", "name", "json"))
    if kind == "custom":
        raise TokenizerError(
            f"tokenizer {name!s:.200}: is custom code, which a file does not contain; name it with --tokenizer "
            "package.module:factory"
        )
    if kind == "hf" and text is None:
        raise TokenizerError("this file of another model's tokenizer is missing")
    tokenizer: Tokenizer
    if kind == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif kind == "bpe" and isinstance(text, str):
        tokenizer = BPETokenizer.from_json(text, origin="stored tokenizer")
    elif kind == "hf" and isinstance(text, str):
        sizes = {key: state.get(key) for key in ("eos_id", "vocab_size")}
        special = SpecialTokens.from_state(state.get("special"))
        tokenizer = ForeignTokenizer(text, **sizes, special=special, origin="stored tokenizer")
    else:
        raise TokenizerError(
            f"stored tokenizer: kind {kind!r:.40} is not one Atlas knows; did a later version write the file?"
        )
    for fact in ("fingerprint", "vocab_size", "eos_id"):
        value = getattr(tokenizer, fact)
        if state.get(fact) != value:
            raise TokenizerError(
                f"stored tokenizer {name!s:.80}: its vocabulary has {fact} {value}, not {state.get(fact)!s:.80}; "
                "the file is damaged or was edited"
            )
    template = state.get("chat_template")
    return with_chat_template(tokenizer, template if isinstance(template, str) else None)


def resolve(spec: str | Path) -> Tokenizer:
    """Return the tokenizer that `spec` names: `gpt2`, the path of a tokenizer.json or of its folder, or
    `package.module:factory`."""
    if spec == "gpt2":
        return gpt2_tokenizer()
    if isinstance(spec, str) and names_tokenizer_code(spec):
        return wrap(import_object(spec)(), name=spec)
    if Path(spec).exists():
        return load(spec)
    raise TokenizerError(
        f"tokenizer {spec}: no such file; give gpt2, a tokenizer.json, or package.module:factory"
    )


def wrap(custom: Any, name: str | None = None) -> Tokenizer:
    """Return any object with `encode`, `decode`, `vocab_size` and `eos_id` as a `Tokenizer`.

    A tokenizer of Atlas, or an object that is already wrapped, is returned unchanged.
    """
    if isinstance(custom, CustomTokenizer) or (isinstance(custom, Tokenizer) and custom.kind != "custom"):
        return custom
    return CustomTokenizer(custom, name)


def _state_in_dataset(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        state = dict(
            json.loads(read_limited(path, limit=MAX_FILE_BYTES).decode("utf-8"))["tokenizer"].items()
        )
        if state.get("kind") in STORED_AS_FILE:
            path = folder / "tokenizer.json"
            state["json"] = read_limited(path, limit=MAX_FILE_BYTES).decode("utf-8")
        return state
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{path}: does not describe a tokenizer ({error!s:.200}); prepare the dataset again"
        ) from None


Tokenizer.gpt2, Tokenizer.train = staticmethod(gpt2_tokenizer), staticmethod(train_bpe)
for _constructor in (load, from_state, from_checkpoint, resolve, wrap):
    setattr(Tokenizer, _constructor.__name__, staticmethod(_constructor))
