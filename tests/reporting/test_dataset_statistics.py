"""What `atlas info` reports of a dataset, recomputed from its documents, its definition, or by hand."""

from __future__ import annotations

import builtins
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.cli import main
from atlas.cli.info_dataset import cleaning_facts
from atlas.config.presets import preset_names
from atlas.data import TokenStream, prepare
from atlas.data.shards import ShardRecord, SplitRecord
from atlas.planning.advice import advise
from atlas.reporting.dataset_statistics import (
    STRETCH_TOKENS,
    Excerpt,
    Stretch,
    measure_lengths,
    sample_documents,
    worst_stretches,
)
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.gpt2 import GPT2Tokenizer
from tests.conftest import SENTENCES

GPT2 = Tokenizer.gpt2()
assert isinstance(GPT2, GPT2Tokenizer)
TIKTOKEN = GPT2._tiktoken


def write_stream(folder: Path, documents: list[list[int]], *, shard_tokens: int = 10**9) -> TokenStream:
    """A split of `documents` of tokens, each with its end of text, in shards of `shard_tokens`."""
    tokens = np.array([id for document in documents for id in [*document, GPT2.eos_id]], "<u2")
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])[:-1].astype("<i8")
    shards = []
    for number, first in enumerate(range(0, len(tokens), shard_tokens)):
        inside = starts[(starts >= first) & (starts < first + shard_tokens)]
        part = tokens[first : first + shard_tokens]
        np.save(folder / f"train-{number:05}.npy", part)
        np.save(folder / f"train-{number:05}.docs.npy", inside)
        record = {"file": f"train-{number:05}.npy", "tokens": len(part), "documents": len(inside)}
        shards.append(ShardRecord(**record, sha256="", documents_sha256=""))
    split = SplitRecord(documents=len(documents), tokens=len(tokens), bytes=0, shards=shards)
    return TokenStream(folder, split, "<u2", GPT2.eos_id, name="made here")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    shard_tokens=st.integers(1, 90),
    at_once=st.integers(1, 7),
)
def test_lengths_are_those_of_the_documents(
    lengths: list[int],
    shard_tokens: int,
    at_once: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """For any distribution over shards, and any size of the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.reporting.dataset_statistics._OFFSETS_PER_STEP", at_once)
        folder = tmp_path_factory.mktemp("lengths")
        stream = write_stream(folder, [[5] * length for length in lengths], shard_tokens=shard_tokens)
        measured = measure_lengths(stream)
    with_end = [length + 1 for length in lengths]
    assert np.repeat(measured.values, measured.counts).tolist() == sorted(with_end)
    assert measured.documents == len(lengths)
    assert measured.longest == max(with_end)
    assert measured.median == statistics.median(with_end)


def test_some_shards_of_a_huge_split_are_measured(tmp_path: Path) -> None:
    """Each shard's documents have their own lengths here, which show the shards that were measured."""
    documents = [[5] * (length - 1) for length in (10, 20, 30, 50, 60, 100) for _ in range(300 // length)]
    stream = write_stream(tmp_path, documents, shard_tokens=300)
    assert measure_lengths(stream, most=len(documents)).values.tolist() == [10, 20, 30, 50, 60, 100]
    assert measure_lengths(stream, most=len(documents) // 2).values.tolist() == [10, 50]


@pytest.mark.parametrize("shard_tokens", [37, 10**6])
def test_excerpts_are_the_beginnings_of_documents(tmp_path: Path, shard_tokens: int) -> None:
    texts = [f"Title {number}\n\n" + "Ünïcödé and 漢字. " * (number % 12) for number in range(40)]
    stream = write_stream(tmp_path, [GPT2.encode(text) for text in texts], shard_tokens=shard_tokens)
    excerpts = sample_documents(stream, GPT2, count=15, characters=60)
    seen = [text + "<|endoftext|>" for text in texts]
    begins = {(text if len(text) <= 60 else text[:60] + "…"): text for text in seen}
    assert len(begins) == 40
    assert len({excerpt.text for excerpt in excerpts}) == 15
    for excerpt in excerpts:
        assert excerpt.tokens == len(GPT2.encode(begins[excerpt.text].removesuffix("<|endoftext|>"))) + 1
    assert excerpts == sample_documents(stream, GPT2, count=15, characters=60)
    assert excerpts != sample_documents(stream, GPT2, count=15, characters=60, seed=1)
    everything = sample_documents(stream, GPT2, count=99, characters=60)
    assert [excerpt.text for excerpt in everything] == list(begins)


def test_planted_stretches_are_found_worst_first(tmp_path: Path) -> None:
    """Three kinds of text that GPT-2's vocabulary has no words for, the worst hidden near the end."""
    prose = GPT2.encode(" ".join(SENTENCES) + "\n")
    # Alternating characters of two bytes and two tokens each: a byte a token. Lone digits are little better.
    planted = {300: "ሀሁሂሃሄህሆለ" * 8, 900: "𐍈𐌰𐌱𐌲" * 16, 1500: "x1 9z 7q 3w " * 40}
    documents = [GPT2.encode(planted[number]) if number in planted else prose for number in range(2000)]
    stream = write_stream(tmp_path, documents, shard_tokens=10_000)
    found = worst_stretches(stream, GPT2)

    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])
    places = [int(np.searchsorted(starts, stretch.start, side="right")) - 1 for stretch in found]
    assert sorted(places) == sorted(planted)
    # By definition: each window of each of these documents, its bytes counted by tiktoken.
    for stretch, place in zip(found, places, strict=True):
        windows = [
            documents[place][start : start + STRETCH_TOKENS]
            for start in range(len(documents[place]) - STRETCH_TOKENS + 1)
        ]
        smallest = min(len(b"".join(TIKTOKEN.decode_tokens_bytes(window))) for window in windows)
        assert stretch.bytes_per_token == smallest / STRETCH_TOKENS
        assert stretch.text in [GPT2.decode(window) for window in windows]
    rates = [stretch.bytes_per_token for stretch in found]
    assert rates == sorted(rates)
    assert rates[-1] < 2 < len(" ".join(SENTENCES)) / len(prose)


@pytest.mark.parametrize("place", [0, 200, 219, 220, 879, 1036])
def test_no_stretch_is_missed_between_two_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr("atlas.reporting.dataset_statistics._BLOCK_TOKENS", 256)
    (letter,), (word,) = GPT2.encode("e"), GPT2.encode(" river")
    ids = [word] * 1100
    ids[place : place + STRETCH_TOKENS] = [letter] * STRETCH_TOKENS
    stream = write_stream(tmp_path, [ids])
    best = worst_stretches(stream, GPT2)[0]
    assert (best.start, best.text, best.bytes_per_token) == (place, "e" * STRETCH_TOKENS, 1.0)


def test_a_stretch_is_in_one_document(tmp_path: Path) -> None:
    (letter,), (word,) = GPT2.encode("e"), GPT2.encode(" river")
    short = write_stream(tmp_path, [[letter] * (STRETCH_TOKENS - 1)] * 30)
    assert worst_stretches(short, GPT2) == []
    (tmp_path / "other").mkdir()
    mixed = write_stream(tmp_path / "other", [[letter] * 63, [word] * 64, [letter] * 63])
    assert [(found.text, found.bytes_per_token) for found in worst_stretches(mixed, GPT2)] == [
        (" river" * 64, 6.0)
    ]


def test_advice_by_hand() -> None:
    """nano: 4 layers of 12 · 128² + 13 · 128, a final norm, 256 positions, and the vocabulary of 1,000, each by 128."""
    nano, *others = advise(19_000_000, vocab_size=1000)
    parameters = 4 * (12 * 128**2 + 13 * 128) + 2 * 128 + 256 * 128 + 1000 * 128
    assert (nano.preset, nano.parameters, nano.max_seq_len) == ("nano", parameters, 256)
    assert nano.tokens_per_parameter == pytest.approx(19_000_000 / parameters)
    assert nano.passes == pytest.approx(20 * parameters / 19_000_000)
    assert [row.preset for row in others] == [name for name in preset_names() if name != "nano"]
    for tokens_per_parameter, fits, verdict in [
        (20, True, "one pass is enough"),
        (19, True, "almost as good as new text"),
        (5, True, "almost as good as new text"),
        (4.9, False, "gives less and less"),
        (0.5, False, "gives less and less"),
        (0.4, False, "larger than this text can teach"),
    ]:
        row = advise(round(tokens_per_parameter * parameters), vocab_size=1000)[0]
        assert (row.fits, verdict in row.verdict) == (fits, True), tokens_per_parameter


def test_cleaning_is_reported_by_step() -> None:
    found = {
        "exact duplicates": {"documents": 1234, "characters": 56_789},
        "control characters": {"documents": 0, "characters": 3},
        "near duplicates": {"documents": 0, "characters": 0},
    }
    assert list(cleaning_facts(found)) == [
        ("removed", "exact duplicates: 1,234 documents, 56,789 characters"),
        ("removed", "control characters: 3 characters"),
        ("removed", "nothing by near duplicates"),
    ]
    assert list(cleaning_facts({})) == []


# The screen


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of 5 to 60 sentences."""
    choose = random.Random(0)
    return [
        f"Title {number}\n" + " ".join(choose.choices(SENTENCES, k=5 + number % 56)) for number in range(200)
    ]


@pytest.fixture(scope="module")
def dataset(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(rows, encoding="utf-8")
    prepare([folder / "texts.jsonl"], folder / "set", GPT2)
    return folder / "set"


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["info", *map(str, arguments)])
    return code, *capsys.readouterr()


def decoded_documents(folder: Path, split: str) -> list[str]:
    """Read with NumPy and tiktoken alone."""
    tokens = np.concatenate([np.load(file) for file in sorted(folder.glob(f"{split}-?????.npy"))])
    return TIKTOKEN.decode(tokens.tolist()).removesuffix("<|endoftext|>").split("<|endoftext|>")


def test_the_screen_agrees_with_the_documents(
    dataset: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, errors = info(capsys, dataset)
    assert (code, errors) == (0, "")
    seen = []
    for split in ("train", "val"):
        documents = decoded_documents(dataset, split)
        seen += documents
        lengths = [len(GPT2.encode(text)) + 1 for text in documents]
        size = sum(len(text.encode()) for text in documents)
        assert f"{len(documents):,} documents, {sum(lengths):,} tokens, {size:,} bytes, " in output
        assert f"{size / sum(lengths):.2f} bytes per token\n" in output
        median = f"{np.median(lengths):,}".removesuffix(".0")
        assert f"{split} lengths  " in output
        assert f"  median {median} tokens, longest {max(lengths):,}, end of text included\n" in output
    assert sorted(seen) == sorted(texts)

    parts = output.split("\n\n")
    assert len(parts) == 5
    rows = parts[3].splitlines()[1:]
    assert len(rows) == 10
    train = decoded_documents(dataset, "train")
    for row in rows:
        tokens, _, text = row.strip().partition("  ")
        begin = text.removesuffix("…").removesuffix("<|endoftext|>").replace("\\n", "\n")
        whole = [document for document in train if document.startswith(begin)]
        assert int(tokens.replace(",", "")) in [len(GPT2.encode(document)) + 1 for document in whole]
    assert len(parts[4].splitlines()) == 4
    assert re.fullmatch(r"\d\.\d\d  \S.*", parts[4].splitlines()[1])


def test_nothing_in_a_text_reaches_the_terminal_as_a_command(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b[31mred\x07\r\nnext\u202e"
    monkeypatch.setattr(
        "atlas.cli.dataset_tables.sample_documents",
        lambda *_, **__: [Excerpt(hostile, 5), Excerpt("quiet", 1234)],
    )
    monkeypatch.setattr("atlas.cli.info_dataset.worst_stretches", lambda *_: [Stretch(0, hostile, 1.25)])
    lines = info(capsys, dataset)[1].splitlines()
    shown = r"\x1b[31mred\x07\r\nnext\u202e"
    assert lines[-5:] == [f"    5  {shown}", "1,234  quiet", "", lines[-2], f"1.25  {shown}"]


class Letters:
    """A tokenizer that no file can hold: a token for each code point below 1000."""

    vocab_size, eos_id = 1001, 1000

    def encode(self, text: str) -> list[int]:
        return [min(ord(character), 999) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_no_text_is_shown_for_a_custom_tokenizer(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    prepare([tmp_path / "text.txt"], tmp_path / "set", Tokenizer.wrap(Letters()))
    code, output, _ = info(capsys, tmp_path / "set")
    assert code == 0
    assert "model size for this text" in output
    assert output.endswith(
        "\ntexts cannot be shown: tokenizer tests.reporting.test_dataset_statistics:Letters is custom code, "
        "which a file does not contain\n"
    )


# The figure


def test_the_figure_shows_the_lengths(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heights drawn are those of NumPy's histogram, and the file is a PNG that is not blank."""
    from matplotlib.axes import Axes
    from matplotlib.image import imread

    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    lines: list[float] = []
    hist, axvline = Axes.hist, Axes.axvline

    def record_hist(axes: Axes, *arguments: Any, **options: Any) -> Any:
        heights, edges, patches = hist(axes, *arguments, **options)
        drawn.append((np.asarray(heights), np.asarray(edges)))
        return heights, edges, patches

    def record_line(axes: Axes, x: float, **options: Any) -> Any:
        lines.append(x)
        return axvline(axes, x, **options)

    monkeypatch.setattr(Axes, "hist", record_hist)
    monkeypatch.setattr(Axes, "axvline", record_line)
    code, output, errors = info(capsys, dataset, "--plot", tmp_path / "lengths.png")
    assert (code, errors) == (0, "")
    assert output.endswith(f"\ndocument lengths: {tmp_path / 'lengths.png'}\n")
    medians = []
    for split, (heights, edges) in zip(("train", "val"), (drawn[1], drawn[2]), strict=True):
        lengths = [len(GPT2.encode(text)) + 1 for text in decoded_documents(dataset, split)]
        expected, _ = np.histogram(lengths, edges)
        assert expected.sum() == len(lengths)  # none falls outside
        np.testing.assert_allclose(heights, expected / len(lengths))
        medians.append(np.median(lengths))
    assert sorted(lines) == sorted([*medians, 128, 256, 512, 1024])

    image = imread(tmp_path / "lengths.png")
    assert image.shape == (825, 1500, 4)
    blue, orange = np.array([31, 119, 180]) / 255, np.array([255, 127, 14]) / 255
    for color in (blue, orange):
        assert (np.abs(image[..., :3] - color).max(axis=-1) < 0.02).sum() > 500


def test_plot_is_refused_before_any_work(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for plot, reason in {
        tmp_path / "lengths.jpg": "must be a PNG image: name a file that ends in .png",
        tmp_path / "none" / "lengths.png": f"there is no folder {tmp_path / 'none'}: make it first",
    }.items():
        assert info(capsys, dataset, "--plot", plot) == (2, "", f"error: --plot {plot}: {reason}\n")
    for other in ("nano", tmp_path):
        code, output, errors = info(capsys, other, "--plot", tmp_path / "lengths.png")
        assert (code, output) == (2, "")
        assert f"of a prepared dataset; {other} is not a dataset: omit --plot" in errors

    real_import = builtins.__import__

    def without_matplotlib(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    code, output, errors = info(capsys, dataset, "--plot", tmp_path / "lengths.png")
    assert (code, output) == (2, "")
    assert errors == 'error: --plot: needs matplotlib: pip install "atlas-llm[plot]"\n'
    assert info(capsys, dataset)[0] == 0
    assert list(tmp_path.iterdir()) == []
