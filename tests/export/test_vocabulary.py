"""Tokenizers of other models in GGUF files: llama.cpp gives the same token ids."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from atlas.errors import ExportError
from atlas.export import vocabulary
from atlas.export.gguf import export_gguf
from atlas.export.llama_cpp import ask_llama_cpp
from atlas.export.verify import verify_gguf
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.foreign import ForeignTokenizer, SpecialTokens
from tests.conftest import corpus
from tests.export.test_export import MODERN, needs_llama_cpp, sharp_model
from tests.foreign import DIGITS, byte_level_bpe

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA_3, QWEN_2 = (_CONTRACTIONS + _WORDS % digits for digits in ("{1,3}", ""))
SPLITS = {
    "llama-bpe": pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated"),
    "qwen2": pre_tokenizers.Split(tokenizers.Regex(QWEN_2), "isolated"),
    "smollm": DIGITS,
    "gpt-2": None,
}
"""The splits of Llama 3, Qwen 2.5 and SmolLM as their tokenizer.json has them."""
UNSEEN = [
    corpus(200),
    inspect.getsource(vocabulary),
    textwrap.dedent("""
        1234567 I'LL we've HTTPServer2 x=3.14e-10;\t\t// ---\r\n\r\n
        Größe, naïve, Ångström. Я живу в Москве 100 лет. 我今年25岁。ยินดีต้อนรับ नमस्ते दुनिया ٣٫١٤
    """),
]


def trained(split: pre_tokenizers.PreTokenizer | None, *, nfc: bool = False) -> ForeignTokenizer:
    """A byte-level BPE with a split, trained on the texts in which the splits differ."""
    numbers = " ".join(f"{n} {n % 100} {n * n}" for n in range(1000, 1300)) + " 123 1234 12 ٣٤ ٣٤ ٣٤٥ ٣٤٥"
    texts = [*vocabulary.TEXTS, *vocabulary.MORE_TEXTS, *UNSEEN, numbers, numbers]
    own = byte_level_bpe(texts * 3, 1500, ["<s>", "</s>", "<|im_end|>", "<pad>"], split, nfc=nfc)
    special = SpecialTokens(bos=0, pad=3, stops=(1, 2), adds_bos=True)
    return ForeignTokenizer(own.to_str(), eos_id=1, vocab_size=1510, special=special, origin="a test")


def sentencepiece(*, prefix: bool) -> ForeignTokenizer:
    """As of Llama 2 (with a blank before the text) or Gemma: ▁ for a blank, characters without a token are bytes."""
    own = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    words = [word for text in (corpus(400), *vocabulary.TEXTS[:2]) for word in text.split()]
    own.train_from_iterator(words if prefix else (" " + word for word in words), trainer)
    content = json.loads(own.to_str())
    vocab = content["model"]["vocab"]
    # SentencePiece merges any two pieces that make a token. So the files of such models list each way to a token.
    ways = ((token, token[:cut], token[cut:]) for token in vocab for cut in range(1, len(token)))
    content["model"]["merges"] = [
        [left, right]
        for token, left, right in sorted(ways, key=lambda way: vocab[way[0]])
        if {left, right} <= vocab.keys()
    ]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    special = SpecialTokens(bos=1, unk=0, stops=(2,), adds_bos=True)
    return ForeignTokenizer(
        json.dumps(content), eos_id=2, vocab_size=len(vocab), special=special, origin="a test"
    )


TOKENIZERS = {
    **{name: trained(split) for name, split in SPLITS.items()},
    "qwen2 and NFC": trained(SPLITS["qwen2"], nfc=True),
    "sentencepiece with a blank": sentencepiece(prefix=True),
    "sentencepiece": sentencepiece(prefix=False),
}


@needs_llama_cpp
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            each, marks=[] if each in ("llama-bpe", "qwen2 and NFC", "sentencepiece") else pytest.mark.slow
        )
        for each in TOKENIZERS
    ],
)
def test_llama_cpp_gives_the_ids_of_another_models_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    model = sharp_model(tokenizer, **MODERN["llama"])
    export_gguf(model, tokenizer, tmp_path / "m.gguf", quantize="f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    facts = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer")}
    if name in SPLITS:
        assert facts["tokenizer.ggml.pre"] == name
    texts = vocabulary.normalized(UNSEEN, tokenizer)
    answer = ask_llama_cpp(tmp_path / "m.gguf", texts, context=128)
    assert answer.token_ids == tokenizer.encode_batch(texts)
    proof = verify_gguf(tmp_path / "m.gguf", model, tokenizer, quantize="f32", max_tokens=5)
    assert proof.holds, str(proof)


@needs_llama_cpp
def test_special_tokens_keep_their_meaning(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama-bpe"]
    export_gguf(sharp_model(tokenizer, **MODERN["llama"]), tokenizer, tmp_path / "m.gguf", quantize="f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    ids = {
        name: fields[f"tokenizer.ggml.{name}_token_id"].contents()
        for name in ("bos", "eos", "eot", "padding")
    }
    assert ids == {"bos": 0, "eos": 1, "eot": 2, "padding": 3}
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [int(gguf.TokenType.CONTROL)] * 4
    assert types[1505] == int(gguf.TokenType.UNUSED)
    assert fields["tokenizer.ggml.tokens"].contents()[:4] == ["<s>", "</s>", "<|im_end|>", "<pad>"]


@needs_llama_cpp
def test_a_split_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_SPLITS", ("qwen2", "no-such-split", "gpt-2"))
    tokenizer = trained(pre_tokenizers.Split(tokenizers.Regex(r"\p{L}{1,2}"), "isolated"))
    with pytest.raises(ExportError, match=r"llama.cpp gives other token ids .* use --format hf"):
        export_gguf(sharp_model(tokenizer, **MODERN["llama"]), tokenizer, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_without_llama_cpp_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "is_available", lambda: False)
    tokenizer = trained(None)
    with pytest.raises(ExportError, match=r'pip install "atlas-llm\[llama\]", or use --format hf'):
        export_gguf(sharp_model(tokenizer, **MODERN["llama"]), tokenizer, tmp_path / "m.gguf")


def test_special_tokens_come_from_the_files_beside_the_tokenizer(tmp_path: Path) -> None:
    """As in a chat model: an answer ends with another token than a text."""
    (tmp_path / "tokenizer.json").write_text(trained(None).hf.to_str())
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": 1, "vocab_size": 1510, "bos_token_id": 0})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": {"content": "<pad>"}, "eos_token": "<|im_end|>", "add_bos_token": True})
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert isinstance(tokenizer, ForeignTokenizer)
    assert tokenizer.special == SpecialTokens(bos=0, eos=2, pad=3, unk=None, stops=(1, 2), adds_bos=True)
    kept = Tokenizer.from_state(tokenizer.state())
    assert isinstance(kept, ForeignTokenizer)
    assert kept.special == tokenizer.special
    old = {key: value for key, value in tokenizer.state().items() if key != "special"}
    assert isinstance(read := Tokenizer.from_state(old), ForeignTokenizer)
    assert read.special == SpecialTokens()
