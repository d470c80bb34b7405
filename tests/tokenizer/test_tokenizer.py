"""Ids against tiktoken and Hugging Face `tokenizers`, both built here from the merges alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from atlas.cli import main
from atlas.data import TextDataset
from atlas.errors import AtlasError
from atlas.tokenizer import END_OF_TEXT, ByteLevelTokenizer, Tokenizer
from atlas.tokenizer.bpe import BPETokenizer

# The pattern as GPT-2's authors published it.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

FRAGMENTS = [
    "the quick brown fox",
    " don't, we'll, it's I'VE ",
    "   \n\n\t  ",
    "\r\n",
    "12345.67%",
    END_OF_TEXT,
    " <|endoftext|>\n",
    "👩‍👩‍👧‍👦🏳️‍🌈🙂",
    "e\u0301 a\u0308\u0323",
    "漢字仮名交じり文。한국어",
    "\x00\x07\x1b[0m\x85\u200b\ufeff\u00a0",
    "مرحبا नमस्ते Ωμέγα",
    "𝕬𝖙𝖑𝖆𝖘 ٣٤ ½ ²",
    "Ġ Ċ ĉ",
]
mixed_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=12), max_size=8).map("".join)

TRAINING_TEXT = [
    "The cat sat on the mat, and the other cats sat with it; they don't mind. 2024 was 2023 + 1.\n" * 20,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, über den Deich. <|endoftext|>\n" * 20,
    "漢字仮名 漢字 🙂🙂 naïve café\n" * 20,
]


def byte_of_char() -> dict[str, int]:
    """`bytes_to_unicode` of GPT-2's encoder.py, inverted."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def by_tiktoken(tokenizer: ByteLevelTokenizer) -> Callable[[str], list[int]]:
    table = byte_of_char()
    ranks = {bytes(table[char] for char in token): id for id, token in enumerate(tokenizer.token_strings())}
    del ranks[END_OF_TEXT.encode()]
    special = {END_OF_TEXT: tokenizer.eos_id}
    return tiktoken.Encoding(
        "t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    ).encode_ordinary


def by_tokenizers(tokenizer: ByteLevelTokenizer) -> Callable[[str], list[int]]:
    vocabulary = {token: id for id, token in enumerate(tokenizer.token_strings()) if token != END_OF_TEXT}
    other = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=tokenizer.merges()))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: other.encode(text).ids


@cache
def gpt2() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.gpt2()
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


@cache
def own() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train(TRAINING_TEXT, 380)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


@cache
def id_of_byte() -> dict[int, int]:
    table = byte_of_char()
    return {table[token]: id for id, token in enumerate(gpt2().token_strings()[:256])}


REFERENCES = {
    "gpt2": cache(lambda: (by_tiktoken(gpt2()), by_tokenizers(gpt2()))),
    "own": cache(lambda: (by_tiktoken(own()), by_tokenizers(own()))),
}


def test_gpt2_ids_that_are_published() -> None:
    assert gpt2().encode("Hello world") == [15496, 995]
    assert gpt2().encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2().vocab_size, gpt2().eos_id) == (50257, 50256)
    assert gpt2().token_strings()[:2] == ["!", '"']
    assert gpt2().token_strings()[220] == "Ġ"
    assert gpt2().merges()[0] == ("Ġ", "t")


@pytest.mark.parametrize("name", REFERENCES)
@given(text=mixed_text)
@settings(deadline=None, max_examples=150)
def test_ids_equal_two_other_implementations(name: str, text: str) -> None:
    tokenizer = gpt2() if name == "gpt2" else own()
    ids = tokenizer.encode(text)
    for reference in REFERENCES[name]():
        assert ids == reference(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("name", REFERENCES)
def test_a_batch_is_its_texts(name: str) -> None:
    tokenizer = gpt2() if name == "gpt2" else own()
    assert tokenizer.encode_batch(FRAGMENTS) == [tokenizer.encode(text) for text in FRAGMENTS]
    assert tokenizer.encode_batch([]) == []


blanks_and_words = st.text(" \n\t\r\v\f\x1c\x85\xa0\u2003\u3000a1.'é“漢🙂", max_size=14)


@given(texts=st.lists(blanks_and_words | mixed_text, max_size=5))
@settings(deadline=None, max_examples=400)
def test_arrays_equal_another_implementation_whatever_the_blanks(texts: list[str]) -> None:
    assert [array.tolist() for array in gpt2().encode_arrays(texts)] == by_tiktoken_gpt2(texts)


def test_arrays_equal_another_implementation_for_every_short_run_of_blanks() -> None:
    texts = ["".join(chars) for length in range(7) for chars in itertools.product(" \n\ta'", repeat=length)]
    assert [array.tolist() for array in gpt2().encode_arrays(texts)] == by_tiktoken_gpt2(texts)


def by_tiktoken_gpt2(texts: list[str]) -> list[list[int]]:
    encode, _ = REFERENCES["gpt2"]()
    return [encode(text) for text in texts]


@given(data=st.binary(max_size=40))
@settings(deadline=None, max_examples=60)
def test_bytes_that_are_not_utf8_decode_with_replacement(data: bytes) -> None:
    """As Python's own decoder replaces them."""
    ids = [id_of_byte()[byte] for byte in data]
    assert gpt2().decode(ids) == data.decode("utf-8", errors="replace")


def test_end_of_text_id_decodes_to_its_name() -> None:
    for tokenizer in (gpt2(), own()):
        assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eos_id]) == "end<|endoftext|>"


def test_lone_surrogates_become_replacement_characters() -> None:
    for tokenizer in (gpt2(), own()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_a_million_blanks_do_not_abort_tiktoken() -> None:
    text = "start" + " " * 1_200_000 + "word\n" + "\t" * 250_000
    ids = gpt2().encode(text)
    assert ids == by_tokenizers(gpt2())(text)
    assert gpt2().encode_batch(["a", text]) == [[64], ids]
    assert [array.tolist() for array in gpt2().encode_arrays(["a", text])] == [[64], ids]


# Training


def test_training_is_deterministic_and_reads_a_stream() -> None:
    shuffled = list(TRAINING_TEXT)
    random.Random(0).shuffle(shuffled)
    again = Tokenizer.train(iter(shuffled), 380)
    assert again.fingerprint == own().fingerprint
    assert own().vocab_size == 380


def test_every_byte_has_a_token_after_any_training_text() -> None:
    everything = "".join(map(chr, [*range(0x250), 0x4E00, 0x1F600]))
    tokenizer = Tokenizer.train(["aaa"], 300)
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    assert 257 <= Tokenizer.train(["ab ab ab"], 5000).vocab_size < 300


@pytest.mark.parametrize("size", [0, 256, 2**24 + 1])
def test_impossible_vocabularies_are_refused(size: int) -> None:
    with pytest.raises(AtlasError, match="at least 257 tokens"):
        Tokenizer.train(["text"], size)


# Saving, loading, states, fingerprints


@pytest.mark.parametrize("make", [gpt2, own])
def test_save_load_and_state_round_trips(make: Callable[[], ByteLevelTokenizer], tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path / "tokenizer.json")
    for loaded in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        Tokenizer.load(tmp_path),
        Tokenizer.resolve(str(tmp_path / "tokenizer.json")),
        Tokenizer.from_state(json.loads(json.dumps(tokenizer.state()))),
    ):
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert loaded.encode("".join(FRAGMENTS)) == tokenizer.encode("".join(FRAGMENTS))


def test_saved_file_is_read_by_hugging_face(tmp_path: Path) -> None:
    own().save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "the cats, über 漢字 🙂"
    assert theirs.encode(text).ids == own().encode(text)
    assert theirs.decode(own().encode(text)) == text
    assert theirs.token_to_id(END_OF_TEXT) == own().eos_id


def test_fingerprints_differ_where_ids_do() -> None:
    tokens, merges = own().token_strings(), own().merges()
    renumbered = BPETokenizer("bpe", [*tokens[:-2], tokens[-1], tokens[-2]], merges, own().eos_id)
    relearnt = BPETokenizer("bpe", tokens, [*merges[:-2], merges[-1], merges[-2]], own().eos_id)
    assert len({own().fingerprint, renumbered.fingerprint, relearnt.fingerprint, gpt2().fingerprint}) == 4


def test_resolve_names_gpt2_and_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tokenizer.resolve("gpt2") is Tokenizer.gpt2()
    (tmp_path / "own_tokenizer.py").write_text(
        "class T:\n    vocab_size, eos_id = 257, 256\n"
        "    def encode(self, text): return list(text.encode())\n"
        "    def decode(self, ids): return bytes(ids).decode()\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    made = Tokenizer.resolve("own_tokenizer:T")
    assert (made.name, made.encode("hi"), made.decode([104, 105])) == ("own_tokenizer:T", [104, 105], "hi")
    for spec, reason in {
        "no_such_module:factory": "cannot be imported",
        "own_tokenizer:nothing": "has no nothing",
        "missing/tokenizer.json": "no such file",
    }.items():
        with pytest.raises(AtlasError, match=reason):
            Tokenizer.resolve(spec)


# Custom objects


def custom(**changes: Any) -> Any:
    def encode(text: str) -> Sequence[int]:
        return list(text.encode())

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    return SimpleNamespace(**{"encode": encode, "decode": decode, "vocab_size": 300, "eos_id": 299} | changes)


def test_any_object_with_the_four_attributes_is_a_tokenizer() -> None:
    tokenizer = Tokenizer.wrap(custom())
    assert tokenizer.encode("né") == [110, 195, 169]
    assert tokenizer.encode_batch(["a", "b"]) == [[97], [98]]
    assert tokenizer.decode([110, 195, 169]) == "né"
    assert Tokenizer.wrap(tokenizer) is tokenizer


@pytest.mark.parametrize("name", ["encode", "decode", "vocab_size", "eos_id"])
def test_a_missing_attribute_is_named(name: str) -> None:
    broken = custom()
    delattr(broken, name)
    with pytest.raises(AtlasError, match=f"has no {name}"):
        Tokenizer.wrap(broken)


@pytest.mark.parametrize(
    "change", [{"eos_id": 300}, {"eos_id": -1}, {"vocab_size": 0}, {"vocab_size": "300"}]
)
def test_impossible_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(AtlasError, match=next(iter(change))):
        Tokenizer.wrap(custom(**change))


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(AtlasError, match="gave id 195, outside its vocab_size 128"):
        Tokenizer.wrap(custom(vocab_size=128, eos_id=0)).encode("é")


def test_a_custom_fingerprint_is_its_own_or_that_of_its_ids() -> None:
    assert Tokenizer.wrap(custom(fingerprint="v7")).fingerprint == "v7"
    plain = Tokenizer.wrap(custom()).fingerprint
    shifted = custom(encode=lambda text: [byte ^ 1 for byte in text.encode()])
    assert plain == Tokenizer.wrap(custom()).fingerprint
    assert (
        len({plain, Tokenizer.wrap(shifted).fingerprint, Tokenizer.wrap(custom(eos_id=298)).fingerprint}) == 3
    )


class Bytes(Tokenizer):
    """Exactly what the FAQ requires of a subclass."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class Shifted(Bytes):
    def encode(self, text: str) -> list[int]:
        return [257, *super().encode(text)]  # outside of the vocabulary


def test_a_subclass_with_four_members_is_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Alone, in a dataset, and from preparing to generating on the command line."""
    own = Bytes()
    assert own.decode(own.encode("naïve")) == "naïve"
    assert own.fingerprint == Bytes().fingerprint != Shifted().fingerprint
    assert own.state()["kind"] == "custom"
    with pytest.raises(AtlasError, match="is custom code and cannot be written"):
        own.save(tmp_path / "tokenizer.json")
    with pytest.raises(AtlasError, match="gave id 257, outside its vocab_size 257"):
        Tokenizer.wrap(Shifted()).encode("a")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The river runs. " * 400, encoding="utf-8")
    dataset = TextDataset(["text.txt"], tokenizer=own, max_seq_len=16)
    assert dataset[0][0].tolist() == list(b"The river runs. ")
    named = ["--tokenizer", f"{__name__}:Bytes"]
    assert main(["prepare", "--input", "text.txt", "--output", "data", *named]) == 0
    sizes = ["hidden_size=8", "num_layers=1", "num_heads=1", "max_seq_len=16"]
    shape = [word for size in sizes for word in ("--set", f"model.{size}")]
    assert main(["train", "--train-data", "data", *named, *shape, "--max-steps", "2", "--device", "cpu"]) == 0
    capfd.readouterr()
    assert main(["generate", "--prompt", "The", "--max-tokens", "3", *named]) == 0
    assert capfd.readouterr().out.startswith("The")


def test_no_file_holds_a_custom_tokenizer(tmp_path: Path) -> None:
    state = json.loads(json.dumps(Tokenizer.wrap(custom()).state() | {"name": "os:system"}))
    with pytest.raises(AtlasError, match="is custom code"):
        Tokenizer.from_state(state)
    with pytest.raises(AtlasError, match="cannot be written"):
        Tokenizer.wrap(custom()).save(tmp_path / "tokenizer.json")


# Refusals


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads(own().hf.to_str())
    change(content)
    return json.dumps(content)


def rename(vocabulary: dict[str, int], old: str, new: str) -> None:
    vocabulary[new] = vocabulary.pop(old)


FOREIGN: dict[str, tuple[str | Callable[[dict[str, Any]], object], str]] = {
    "not JSON": ("{", "is not a tokenizer.json"),
    "nested without end": ("[" * 100_000, "is not a tokenizer.json"),
    "no model": ("[]", "has no model"),
    "other model": ((lambda c: c["model"].update(type="WordPiece")), "WordPiece, not BPE"),
    "dropout": ((lambda c: c["model"].update(dropout=0.1)), "sets dropout"),
    "byte fallback": ((lambda c: c["model"].update(byte_fallback=True)), "sets byte_fallback"),
    "ignored merges": ((lambda c: c["model"].update(ignore_merges=True)), "sets ignore_merges"),
    "normalizer": ((lambda c: c.update(normalizer={"type": "Lowercase"})), "its normalizer changes the text"),
    "other split": ((lambda c: c.update(pre_tokenizer={"type": "Whitespace"})), "is not ByteLevel"),
    "no split": ((lambda c: c["pre_tokenizer"].update(use_regex=False)), "does not split like GPT-2's"),
    "prefix space": ((lambda c: c["pre_tokenizer"].update(add_prefix_space=True)), "puts a space"),
    "no vocabulary": ((lambda c: c["model"].pop("vocab")), "has no vocabulary"),
    "gap in ids": ((lambda c: c["model"]["vocab"].update({"Ġx": 10**9})), "without a gap"),
    "ids that are no numbers": ((lambda c: c["model"]["vocab"].update({"!": "1"})), "without a gap"),
    "not byte-level": ((lambda c: c["model"]["vocab"].update({"日本": 380})), "not byte-level"),
    "a byte missing": (
        (lambda c: rename(c["model"]["vocab"], "é", "éé")),
        "lacks some of the 256 bytes",
    ),
    "merges missing": ((lambda c: c["model"].pop("merges")), "has no merges"),
    "no pair": ((lambda c: c["model"]["merges"].append(["a", "b", "c"])), "is not a pair"),
    "unknown merge": ((lambda c: c["model"]["merges"].append(["q", "!"])), "not in its vocabulary"),
    "no end of text": ((lambda c: c.update(added_tokens=[])), "has no <|endoftext|>"),
    "another added token": (
        (lambda c: c["added_tokens"].append({"id": 1, "content": "!", "special": False})),
        "added tokens besides",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_anything_but_a_byte_level_bpe_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source, reason = FOREIGN[name]
    text = source if isinstance(source, str) else changed(source)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(AtlasError, match=re.escape(reason)) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_hidden_truncation_in_a_file_changes_nothing(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(
        changed(lambda c: c.update(truncation=truncation)), encoding="utf-8"
    )
    assert Tokenizer.load(tmp_path).encode(TRAINING_TEXT[0]) == own().encode(TRAINING_TEXT[0])


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="no such tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AtlasError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "state",
    [{}, {"kind": "sentencepiece"}, {"kind": "bpe"}, {"kind": "bpe", "json": 3}, {"kind": ["gpt2"]}],
)
def test_unknown_states_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(AtlasError, match="stored tokenizer"):
        Tokenizer.from_state(state)


@pytest.mark.parametrize("make", [gpt2, own])
def test_a_state_with_another_fingerprint_is_refused(make: Callable[[], ByteLevelTokenizer]) -> None:
    with pytest.raises(AtlasError, match="damaged or was edited"):
        Tokenizer.from_state(make().state() | {"fingerprint": hashlib.sha256(b"").hexdigest()})


def test_a_damaged_merge_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas.tokenizer import gpt2 as module

    monkeypatch.setattr(module, "MERGES_SHA256", "0" * 64)
    with pytest.raises(AtlasError, match="install Atlas again"):
        module.gpt2_tokenizer.__wrapped__()
