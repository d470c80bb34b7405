"""Import a model from a GGUF file, the format of llama.cpp. Quantized weights become fp32 numbers.

A GGUF file has the tokens of its tokenizer, and of the rule that splits a text into words only a name. Atlas builds the
tokenizer, and compares its token ids with those that llama.cpp gives with the vocabulary in the file.
"""

from __future__ import annotations

import itertools
import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from atlas.errors import AtlasError, ExportError
from atlas.export.gguf import read_gguf
from atlas.export.llama_cpp import is_available
from atlas.export.vocabulary import MORE_TEXTS, TEXTS, ids_in_llama_cpp
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.byte_level import SPLITS
from atlas.tokenizer.load import with_chat_template

_KEY = "tokenizer.ggml."
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {"llama-bpe": _GPT4.format(digits="{1,3}"), "qwen2": _GPT4.format(digits="")}
_SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "default": "gpt-2", "deepseek-r1-qwen": "qwen2"}
_EACH_DIGIT = ("smollm",)  # GPT-2's split, after each digit has become a word
_LONGEST_TOKEN = 512  # characters; SentencePiece's have at most 16, or a few dozen
_NAMED = ("bos", "eos", "unknown", "padding")


def import_gguf(path: str | Path, *, tokenizer: str | None = None) -> tuple[AtlasLM, Tokenizer, list[str]]:
    """Return the model in a GGUF file, in fp32 on the CPU, its tokenizer, and notes for the user. The tokenizer is the
    file's own, unless `tokenizer` names another one.

    Raises `ExportError` for an architecture or a tokenizer that Atlas does not support, and for a damaged file.
    """
    model, metadata = read_gguf(path)
    notes: list[str] = []
    if tokenizer is not None:
        own = Tokenizer.resolve(tokenizer)
    else:
        own = _build(metadata, path)
        notes = _compare(own, metadata, path)
    if own.vocab_size != model.config.vocabulary:
        raise ExportError(
            f"{path}: the model has {model.config.vocabulary:,} tokens, but tokenizer {tokenizer or own.name} has "
            f"{own.vocab_size:,}: they are not from the same model"
        )
    template = metadata.get("tokenizer.chat_template")
    return model, with_chat_template(own, template if isinstance(template, str) else None), notes


def _build(metadata: dict[str, Any], path: str | Path) -> Tokenizer:
    """Return the tokenizer that a file describes."""
    kind = metadata.get(f"{_KEY}model")
    try:
        if kind == "gpt2":
            hf = _byte_level(metadata)
        elif kind == "llama":
            hf = _sentencepiece(metadata)
        else:
            raise ExportError(f"its tokenizer is of the kind {kind!s:.40}, which Atlas cannot build")
        _add_special_tokens(hf, metadata)
        files = _files(metadata)
    except Exception as error:  # the library may raise anything for strange values
        reason = (
            str(error) if isinstance(error, ExportError) else f"its tokenizer is damaged ({error!s:.100})"
        )
        raise ExportError(
            f"{path}: {reason:.200}: give the model's tokenizer.json with --tokenizer"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        hf.save(str(Path(folder, "tokenizer.json")))
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
        try:
            return Tokenizer.load(folder)
        except AtlasError as error:
            reason = str(error).rsplit(f"{folder}/", 1)[-1]
            raise ExportError(f"{path}: {reason}; give the model's tokenizer.json with --tokenizer") from None


def _add_special_tokens(hf: HFTokenizer, metadata: dict[str, Any]) -> None:
    """Add the tokens that are found in a text as a whole. The vocabulary has them already, so they keep their ids."""
    kinds = metadata.get(f"{_KEY}token_type", [])
    pairs = zip(metadata[f"{_KEY}tokens"], kinds, strict=False)
    added = [(token, type) for token, type in pairs if type in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    for is_control, some in itertools.groupby(added, key=lambda pair: pair[1] == TokenType.CONTROL):
        entries = [AddedToken(token, special=is_control, normalized=False) for token, _ in some]
        (hf.add_special_tokens if is_control else hf.add_tokens)(entries)


def _files(metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files that say in Hugging Face's format which tokens have a meaning."""
    tokens = metadata[f"{_KEY}tokens"]
    ids = {name: metadata.get(f"{_KEY}{name}_token_id") for name in (*_NAMED, "eot", "eom")}
    bos, eos, unknown, padding = (
        tokens[id] if isinstance(id := ids[name], int) and 0 <= id < len(tokens) else None for name in _NAMED
    )
    ends = [id for id in (ids["eos"], ids["eot"], ids["eom"]) if id is not None]
    adds_bos = metadata.get(f"{_KEY}add_bos_token", metadata[f"{_KEY}model"] == "llama")
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unknown, "pad_token": padding}
    return {
        "config.json": {"eos_token_id": ids["eos"], "vocab_size": len(tokens)},
        "generation_config.json": {"eos_token_id": ends},
        "tokenizer_config.json": {**named, "add_bos_token": adds_bos},
    }


def _byte_level(metadata: dict[str, Any]) -> HFTokenizer:
    """Return a byte-level BPE with the split that the file names."""
    stated = metadata.get(f"{_KEY}pre", "default")
    split = _SAME_AS.get(stated, stated)
    words: list[Any] = []
    if split in _EACH_DIGIT:
        words, split = [pre_tokenizers.Digits(individual_digits=True)], "gpt-2"
    expression = {**SPLITS, **_EXPRESSIONS}[split] if split in {*SPLITS, *_EXPRESSIONS} else ""
    if expression == "":
        raise ExportError(
            f"its tokenizer splits a text by the rule {stated!s:.40}, which Atlas does not know"
        )
    if expression is not None:
        words.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    words.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None))
    merges = [tuple(merge.split(" ")) for merge in metadata[f"{_KEY}merges"]]
    model = models.BPE(_ids(metadata), merges, ignore_merges=split == "llama-bpe")
    hf = HFTokenizer(model)
    hf.pre_tokenizer = words[0] if len(words) == 1 else pre_tokenizers.Sequence(words)
    hf.decoder = decoders.ByteLevel()
    return hf


def _sentencepiece(metadata: dict[str, Any]) -> HFTokenizer:
    """Return SentencePiece's BPE: the merge with the best score of its result comes first."""
    tokens, scores = metadata[f"{_KEY}tokens"], metadata[f"{_KEY}scores"]
    unknown = metadata.get(f"{_KEY}unknown_token_id", 0)
    ids = _ids(metadata)
    model = models.BPE(
        ids,
        [*_merges(tokens, scores, ids)],
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[unknown],
    )
    hf = HFTokenizer(model)
    has_prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    blanks = [normalizers.Replace(" ", "▁")]
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *blanks] if has_prefix else blanks)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    hf.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    return hf


def _ids(metadata: dict[str, Any]) -> dict[str, int]:
    return {token: id for id, token in enumerate(metadata[f"{_KEY}tokens"])}


def _merges(tokens: Sequence[str], scores: Sequence[float], ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield every pair of tokens that together are a token, in the order in which SentencePiece joins pairs."""
    for id in sorted(range(len(tokens)), key=lambda id: (-scores[id], id)):
        token = tokens[id][:_LONGEST_TOKEN]
        pairs = ((token[:place], token[place:]) for place in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _compare(tokenizer: Tokenizer, metadata: dict[str, Any], path: str | Path) -> list[str]:
    """Raise `ExportError` if llama.cpp gives other token ids than `tokenizer` with the vocabulary in the file."""
    if not is_available():
        return [
            'llama.cpp did not check the token ids; pip install "atlas-llm[llama]", and import the file again to be '
            "sure"
        ]
    texts = [*TEXTS, *MORE_TEXTS]
    vocabulary = {key: value for key, value in metadata.items() if key.startswith(_KEY)}
    ours = tokenizer.encode_batch(texts)
    try:
        theirs = ids_in_llama_cpp(vocabulary, texts)
    except (struct.error, ValueError, TypeError, LookupError):  # values that no file should have
        theirs = None
    if theirs is None:
        raise ExportError(
            f"{path}: llama.cpp cannot use the vocabulary in this file: give the model's tokenizer.json with "
            "--tokenizer"
        )
    for text, expected, found in zip(texts, theirs, ours, strict=True):
        if expected != found:
            raise ExportError(
                f"{path}: llama.cpp gives other token ids than the tokenizer that Atlas builds from the file, for "
                f"example for {text!r:.60}: give the model's tokenizer.json with --tokenizer"
            )
    return [f"the tokenizer gives llama.cpp's token ids in {len(texts)} texts"]
