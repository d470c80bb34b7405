"""The two splits of own vocabularies: against the library with the pattern as published, llama.cpp, and by measure."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from atlas.cli import main
from atlas.config.model import ModelConfig
from atlas.data import open_dataset, prepare
from atlas.data.prepare.train_tokenizer import choose_split, excerpts
from atlas.data.text.formats import decode
from atlas.errors import AtlasError
from atlas.export import llama_cpp
from atlas.export.gguf import export_gguf
from atlas.model.transformer import build_model
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.bpe import BPETokenizer, train_bpe
from atlas.tokenizer.byte_level import SPLITS, token_bytes
from tests.conftest import corpus

# As in the tokenizer.json of Qwen3.5.
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = {
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "ta": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் உரிமைகளிலும் சமமானவர்கள்.",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ar": "يُولَدُ جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "code": "def f(x):\n\tif x>10: return 'it\\'s'\n\n\n    # 12345 camelCase\r\n",
}
ODD = (
    "aZ é\u0301\u0902\u093f\u200c\u200d क்ไ 中。、!?'’_-\t\n\r  \u00a0\u3000 0१٣½²Ⅷ🙂e\u0308'S'll ´`^~$€+№"
    "\ufeff\x1c\x85\u2028"
)
mixed = st.lists(st.sampled_from([*ODD, *SENTENCES.values()]) | st.text(max_size=5), max_size=25).map("".join)


def own(split: str) -> BPETokenizer:
    return train_bpe([f"{sentence}\n" * 20 for sentence in SENTENCES.values()], 900, split)


TOKENIZERS = {split: own(split) for split in SPLITS}


@given(mixed)
@settings(deadline=None, max_examples=300)
def test_the_ids_are_those_of_tiktoken_with_the_published_pattern(text: str) -> None:
    tokenizer = TOKENIZERS["qwen35"]
    tokens = [token for token in tokenizer.token_strings() if token != "<|endoftext|>"]
    ranks = {token_bytes(token): rank for rank, token in enumerate(tokens)}
    other = tiktoken.Encoding("q", pat_str=QWEN35, mergeable_ranks=ranks, special_tokens={})
    ids = [id + (id >= tokenizer.eos_id) for id in other.encode_ordinary(text)]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_keeps_the_split(split: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[split]
    tokenizer.save(tmp_path / "tokenizer.json")
    text = " ".join(SENTENCES.values())
    for again in (Tokenizer.load(tmp_path), Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())))):
        assert isinstance(again, BPETokenizer)
        assert again.split == split
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(text) == tokenizer.encode(text)
    other = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_the_split_is_part_of_what_identifies_a_tokenizer() -> None:
    one = TOKENIZERS["qwen35"]
    other = BPETokenizer("bpe", one.token_strings(), one.merges(), one.eos_id, "gpt-2")
    assert one.fingerprint != other.fingerprint
    assert one.encode(SENTENCES["hi"]) != other.encode(SENTENCES["hi"])


@pytest.mark.parametrize("change", [("behavior", "Removed"), ("invert", True), ("pattern", {"Regex": "a+"})])
def test_another_pattern_is_another_models(change: tuple[str, object], tmp_path: Path) -> None:
    content = json.loads(TOKENIZERS["qwen35"].hf.to_str())
    content["pre_tokenizer"]["pretokenizers"][0].update([change])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AtlasError, match="its pre-tokenizer is not ByteLevel"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_gives_the_same_ids(split: str, tmp_path: Path) -> None:
    tokenizer, choose = TOKENIZERS[split], random.Random(5)
    shape = ModelConfig(
        hidden_size=16, num_layers=1, num_heads=2, max_seq_len=64, vocab_size=tokenizer.vocab_size
    )
    export_gguf(build_model(shape, seed=1), tokenizer, tmp_path / "m.gguf", quantize="f32")
    texts = [*SENTENCES.values(), " ".join(SENTENCES.values())]
    texts += ["".join(choose.choices(ODD, k=choose.randrange(1, 30))) for _ in range(600)]
    answer = llama_cpp.ask_llama_cpp(tmp_path / "m.gguf", texts, context=64)
    assert answer.token_ids == [tokenizer.encode(text) for text in texts]


@given(mixed.filter(bool), st.sampled_from([*SPLITS]))
@settings(deadline=None, max_examples=200)
def test_a_cut_of_a_long_text_changes_no_token(text: str, split: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    end = decode.last_word_end(text)
    encode = TOKENIZERS[split].encode
    if end < len(text):
        assert encode(text[:end]) + encode(text[end:]) == encode(text)


@pytest.mark.parametrize(
    ("language", "saves"), [("hi", 2), ("ta", 2), ("bn", 2), ("th", 1.5), ("de", 0), ("code", 0)]
)
def test_the_split_is_chosen_by_measure(language: str, saves: float) -> None:
    words = SENTENCES[language].split() if language != "th" else re.findall(".{6,10}", SENTENCES["th"])
    if language == "code":
        words = [f"{word}\n" for word in SENTENCES["code"].split("\n")]
    shuffle = random.Random(3)
    sample = [" ".join(shuffle.choices(words, k=40)) for _ in range(200)]
    split, notes = choose_split(sample, 400)
    if not saves:
        assert (split, notes) == ("gpt-2", [])
        return
    [note] = notes
    after, before = map(float, re.findall(r"\d+\.\d\d", note))
    assert split == "qwen35"
    assert after > saves * before


def test_prepare_says_which_split_it_chose_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shuffle = random.Random(3)
    words = SENTENCES["hi"].split()
    for number in range(120):
        text = " ".join(shuffle.choices(words, k=60))
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    command = ["prepare", "--input", str(tmp_path), "--train-tokenizer", "400", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert re.search(
        r"splits words as Qwen3\.5's does: in a sample, [\d.]+ bytes per token, with GPT-2's split [\d.]+; a GGUF",
        capsys.readouterr().err,
    )
    tokenizer = open_dataset(tmp_path / "out").tokenizer()
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.split == "qwen35"
    (tmp_path / "en.txt").write_text(corpus(), encoding="utf-8")
    english = prepare([tmp_path / "en.txt"], tmp_path / "en", train_tokenizer=400).dataset.tokenizer()
    assert isinstance(english, BPETokenizer)
    assert english.split == "gpt-2"


def test_long_runs_without_a_blank_take_linear_time() -> None:
    letters = random.Random(1)
    dna = "".join(letters.choices("ACGT", k=1_000_000))
    start = time.process_time()
    tokenizer = train_bpe([dna], 2000)
    assert time.process_time() - start < 60  # as one word, the time is quadratic
    assert tokenizer.vocab_size == 2000
    assert tokenizer.decode(tokenizer.encode(dna)) == dna


def test_long_runs_of_blanks_take_linear_time() -> None:
    blanks = random.Random(1)
    start = time.process_time()
    for text in (" " * 300_000, "\n" * 300_000, "".join(blanks.choices(" \t", k=300_000))):
        tokenizer = train_bpe([f"A heading\n{text}centred text\n" + "word " * 2000], 600)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 60


@pytest.mark.parametrize("words", [6, 200, 3_000_000])
def test_the_sample_has_whole_words_of_short_and_long_texts(words: int) -> None:
    shuffle = random.Random(1)
    texts = [" ".join(shuffle.choices(["word", "river", "mill"], k=words)) for _ in range(3_000_000 // words)]
    total = sum(map(len, texts))
    sample = [*excerpts(texts, 100_000 / total)]
    assert 90_000 < sum(map(len, sample)) <= 100_000
    cut = sum(text not in texts for text in sample) if words < 3_000_000 else 0
    assert cut <= (0 if words == 6 else len(sample))
    assert min(map(len, sample)) >= min(2000, *map(len, texts))
