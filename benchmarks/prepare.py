"""Measure the speed and memory of `atlas prepare`, compared with other ways to tokenize text.

    python benchmarks/prepare.py                            300 MB of generated text: half an hour
    python benchmarks/prepare.py --megabytes 30             a quick look
    python benchmarks/prepare.py --data text.txt            your own text
    python benchmarks/prepare.py --nanogpt ../nanoGPT       also its data/shakespeare/prepare.py

The text is in a zip file with the layout of the Kaggle archive. Each way runs in a separate process. In every round,
all ways run in turn, and the tables show medians. A MB is 10⁶ bytes of UTF-8 text.

The time of Atlas is that of the complete command: start, unzipping, finding the articles, splitting, tokenizing,
hashing and writing. The times of the other ways do not include their start (imports, loading a vocabulary), except in
the last column. tiktoken encodes articles in memory, one by one, and keeps no tokens. `datasets` loads a JSONL file,
maps a fast tokenizer over its rows in batches, and writes an Arrow file.

Memory is the peak of the sum over all processes of `atlas prepare`, sampled every 50 ms in separate runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from results import add_record_option, recorded

GAP = "\n\n\n"
PART_CHARS = 1_000_000
SAMPLE_SECONDS = 0.05
NEW_WORD_EVERY = 16


# The text


def read_articles(path: Path, limit: int) -> list[str]:
    """Return the articles of a text, up to `limit` bytes. Two or more empty lines separate articles."""
    articles: list[str] = []
    size = 0
    for article in re.split(r"\n(?:[ \t]*\n){2,}", path.read_text(encoding="utf-8")):
        if text := article.strip():
            articles.append(text)
            size += len(text.encode()) + len(GAP)
            if size >= limit:
                break
    return articles


def make_articles(folder: Path, limit: int) -> list[str]:
    """Return articles of sentences from Python's documentation, up to `limit` bytes.

    The same sentences repeat, so a tokenizer that caches words would find all words in its cache, unlike in real text.
    So every 16th word is new: the beginning of one word joined to the end of another, or, one time in four, a number.
    New words are drawn each time that a sentence is used. This gives more variety than real text has. In 5 MB, 10.6 %
    of the words did not occur before (Shakespeare's plays: 7.3 %), and 14.1 % are not among the 10,000 commonest words
    (11.3 %).
    """
    from atlas.data.text.demo import write_demo_corpus

    rows = write_demo_corpus(folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    corpus = " ".join(" ".join(json.loads(row)["text"] for row in rows).split())
    sentences = [text for text in re.split(r"(?<=[.!?]) ", corpus) if 20 <= len(text) <= 400]
    words = sorted(set(re.findall(r"[a-z]{4,}", corpus)))
    heads, tails = sorted({word[:3] for word in words}), sorted({word[-4:] for word in words})
    heads += ["é", "Zür", "naï", "œu"]  # a few characters of more than one byte
    choose = random.Random(0)

    def new_word() -> str:
        if choose.random() < 0.25:
            return str(choose.randrange(100_000))
        return f"{choose.choice(heads)}{choose.choice(tails)}"

    templates = []
    for sentence in sentences:
        parts = sentence.replace("%", "%%").split(" ")
        places = range(choose.randrange(NEW_WORD_EVERY), len(parts), NEW_WORD_EVERY)
        for place in places:
            parts[place] = "%s"
        templates.append((" ".join(parts), len(places)))

    articles: list[str] = []
    size = 0
    while size < limit:
        paragraphs = [f"{new_word().capitalize()} {new_word()} {len(articles)}"]
        for _ in range(choose.randint(1, 8)):
            chosen = choose.choices(templates, k=choose.randint(2, 8))
            paragraphs.append(" ".join(text % tuple(new_word() for _ in range(n)) for text, n in chosen))
        articles.append("\n\n".join(paragraphs))
        size += len(articles[-1].encode()) + len(GAP)
    return articles


@dataclass(frozen=True)
class Corpus:
    """The same articles in the formats of all ways, and their size in bytes."""

    archive: Path
    text: Path
    rows: Path
    megabytes: float

    @staticmethod
    def write(folder: Path, articles: Sequence[str]) -> Corpus:
        folder.mkdir()
        text = GAP.join(articles)
        (folder / "input.txt").write_text(text, encoding="utf-8", newline="\n")
        with (folder / "articles.jsonl").open("w", encoding="utf-8", newline="\n") as rows:
            rows.writelines(json.dumps({"text": article}, ensure_ascii=False) + "\n" for article in articles)
        with zipfile.ZipFile(folder / "archive.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(folder / "input.txt", "AllCombined.txt")
            parts = [text[start : start + PART_CHARS] for start in range(0, len(text), PART_CHARS)]
            for number, part in enumerate(parts):
                half, place = divmod(number, -(-len(parts) // 2))
                archive.writestr(f"{half + 1}of2/wiki_{place:02}", part)
        megabytes = (folder / "input.txt").stat().st_size / 1e6
        return Corpus(folder / "archive.zip", folder / "input.txt", folder / "articles.jsonl", megabytes)


# The ways, each in a separate process


def gpt2_encoding() -> Any:
    """Return tiktoken's GPT-2 encoding, built from Atlas's merge table, so that nothing is downloaded."""
    import tiktoken

    from atlas.tokenizer import Tokenizer
    from atlas.tokenizer.byte_level import token_bytes
    from atlas.tokenizer.gpt2 import GPT2_SPLIT, GPT2Tokenizer

    gpt2 = Tokenizer.gpt2()
    assert isinstance(gpt2, GPT2Tokenizer)
    ranks = {token_bytes(token): id for id, token in enumerate(gpt2.token_strings()[: gpt2.eos_id])}
    special = {"<|endoftext|>": gpt2.eos_id}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def run_tiktoken(text: str) -> dict[str, float]:
    encoding = gpt2_encoding()
    articles = Path(text).read_text(encoding="utf-8").split(GAP)
    start = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(article)) for article in articles)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def run_datasets(rows: str, processes: str) -> dict[str, float]:
    import datasets  # type: ignore[import-untyped]
    import pyarrow.compute

    from atlas.tokenizer import Tokenizer
    from atlas.tokenizer.byte_level import ByteLevelTokenizer

    gpt2 = Tokenizer.gpt2()
    assert isinstance(gpt2, ByteLevelTokenizer)
    tokenizer = gpt2.hf

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoded.ids for encoded in tokenizer.encode_batch_fast(batch["text"])]}

    datasets.disable_progress_bars()
    start = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=rows, split="train")
    made = loaded.map(encode, batched=True, num_proc=int(processes), remove_columns=["text"])
    seconds = time.perf_counter() - start
    lengths = pyarrow.compute.list_value_length(made.data.column("ids"))
    return {"seconds": seconds, "tokens": pyarrow.compute.sum(lengths).as_py()}


def run_nanogpt(script: str) -> dict[str, float]:
    """Run nanoGPT's script, changed only so that it does not download the vocabulary."""
    import numpy as np
    import tiktoken

    encoding = gpt2_encoding()
    tiktoken.get_encoding = lambda encoding_name: encoding
    start = time.perf_counter()
    runpy.run_path(script, run_name="__main__")
    seconds = time.perf_counter() - start
    bins = [Path(script).with_name(f"{split}.bin") for split in ("train", "val")]
    return {"seconds": seconds, "tokens": sum(len(np.memmap(file, np.uint16, mode="r")) for file in bins)}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "tiktoken": run_tiktoken,
    "datasets": run_datasets,
    "nanogpt": run_nanogpt,
}


@dataclass
class Way:
    """A command, and its seconds in each round."""

    name: str
    command: list[str]
    leaves: Path | None = None
    """Files that are removed before each run, so that the run reuses nothing from an earlier run."""
    alone: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    tokens: int = 0
    problem: str = ""

    def run(self) -> None:
        if self.problem:
            return
        self.clear()
        start = time.perf_counter()
        done = subprocess.run(self.command, capture_output=True, text=True, encoding="utf-8")
        total = time.perf_counter() - start
        if done.returncode:
            self.problem = (done.stderr.strip().splitlines() or ["failed without a word"])[-1].strip(" │")
            return
        last = done.stdout.strip().splitlines()[-1]
        answer = json.loads(last) if "--child" in self.command else {"seconds": total}
        self.total.append(total)
        self.alone.append(answer["seconds"])
        self.tokens = int(answer.get("tokens", 0))

    def clear(self) -> None:
        if self.leaves:
            shutil.rmtree(self.leaves, ignore_errors=True)
        if hasattr(os, "sync"):
            os.sync()  # so that this run does not wait for writes of the previous run


def child(kind: str, *arguments: object) -> list[str]:
    return [sys.executable, __file__, "--child", kind, *map(str, arguments)]


def atlas_prepare(corpus: Corpus, output: Path, *options: str) -> list[str]:
    files = ["--input", str(corpus.archive), "--output", str(output)]
    return [sys.executable, "-m", "atlas", "prepare", *files, *options]


def all_ways(corpus: Corpus, folder: Path, nanogpt: Path | None) -> dict[str, Way]:
    cache = Path(os.environ["HF_DATASETS_CACHE"])
    output = folder / "prepared"
    ways = {
        "atlas": Way("atlas prepare", atlas_prepare(corpus, output), output),
        "atlas 1": Way("atlas prepare --workers 1", atlas_prepare(corpus, output, "--workers", "1"), output),
        "tiktoken": Way("tiktoken alone, one process", child("tiktoken", corpus.text)),
        "datasets 1": Way("datasets.map, 1 process", child("datasets", corpus.rows, 1), cache),
        "datasets 2": Way("datasets.map, 2 processes", child("datasets", corpus.rows, 2), cache),
    }
    if nanogpt:
        copy = folder / "nanogpt" / "prepare.py"
        copy.parent.mkdir()
        shutil.copy(nanogpt / "data" / "shakespeare" / "prepare.py", copy)
        shutil.copy(corpus.text, copy.with_name("input.txt"))
        ways["nanogpt"] = Way("nanoGPT's prepare.py", child("nanogpt", copy))
    return ways


# The output


def print_speed(ways: dict[str, Way], megabytes: float) -> None:
    """Print a Markdown table, and the ratio of Atlas's speed to the other ways."""
    speeds = {key: megabytes / statistics.median(way.alone) for key, way in ways.items() if way.alone}
    print(f"\n| {'':<28} | MB/s | with its start | tokens |\n|{'-' * 30}|---:|---:|---:|")
    for key, way in ways.items():
        if way.problem:
            print(f"| {way.name:<28} | {way.problem} | | |")
        else:
            with_start = megabytes / statistics.median(way.total)
            print(
                f"| {way.name:<28} | {speeds[key]:.2f} | {with_start:.2f} | {f'{way.tokens:,}' if way.tokens else ''} |"
            )
    peers = [("tiktoken alone", ["tiktoken"]), ("datasets.map, the better", ["datasets 1", "datasets 2"])]
    for name, keys in peers:
        best = max((speeds[key] for key in keys if key in speeds), default=None)
        if best and "atlas" in speeds:
            print(f"atlas prepare has {speeds['atlas'] / best:.2f} of the speed of {name}")


def check_tokens(folder: Path, articles: Sequence[str], expected_tokens: int, *, generated: bool) -> None:
    """Check for a sample of documents that Atlas's tokens equal tiktoken's. A generated text has nothing to clean. For
    such a text, also check that the documents are the articles, and that the number of tokens is equal."""
    from atlas.data import open_dataset

    encoding = gpt2_encoding()
    known = set(articles)
    dataset = open_dataset(folder)
    streams = [stream for name in ("train", "val") if (stream := dataset.split(name))]
    compared = 0
    for stream in streams:
        ends = [*stream.document_starts().tolist(), stream.num_tokens]
        count = min(50, stream.num_documents)
        for number in random.Random(0).sample(range(stream.num_documents), count):
            ids = stream.read(ends[number], ends[number + 1]).tolist()
            text = encoding.decode(ids[:-1])
            if ids != [*encoding.encode_ordinary(text), stream.eos_id] or (generated and text not in known):
                raise SystemExit(f"document {number}: is not an article as tiktoken encodes it: {text:.80}")
            compared += 1
    print(f"\n{compared} documents compared with tiktoken's ids: equal")
    documents = sum(stream.num_documents for stream in streams)
    tokens = sum(stream.num_tokens for stream in streams)
    print(
        f"{documents:,} documents and {tokens:,} tokens, an end of text in each, of {len(articles):,} articles"
    )
    if generated and (documents, tokens) != (len(articles), expected_tokens + len(articles)):
        raise SystemExit(f"tiktoken gives {expected_tokens:,} without the ends of text: that is not equal")


def peak_memory(command: list[str]) -> tuple[int, int]:
    """Return two peaks in bytes: of all memory of a command and its children, and of their anonymous memory. Anonymous
    memory excludes pages of mapped files, which the system can reclaim. On systems other than Linux, the second peak is
    0."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total = anonymous = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
            sizes = [_memory(one) for one in [process, *process.children(recursive=True)]]
            total = max(total, sum(size for size, _ in sizes))
            anonymous = max(anonymous, sum(size for _, size in sizes))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return total, anonymous


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Return a process's share of memory, and the anonymous part of this share. On Linux, shared pages are divided
    among the processes (PSS). On other systems, shared pages are left out (USS)."""
    try:
        if not psutil.LINUX:
            return process.memory_full_info().uss, 0
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    except (psutil.Error, OSError):  # the process has ended
        return 0, 0
    sizes = dict(re.findall(r"^(Pss|Pss_Anon): +(\d+) kB", rollup, re.MULTILINE))
    return int(sizes.get("Pss", 0)) * 1024, int(sizes.get("Pss_Anon", 0)) * 1024


def print_memory(corpora: Sequence[Corpus], folder: Path) -> None:
    kind = "PSS" if psutil.LINUX else "USS"
    print(f"\n| atlas prepare, peak of all processes | {kind} | anonymous part |\n|---|---:|---:|")
    peaks = []
    for number, corpus in enumerate(corpora):
        output = folder / f"memory-{number}"
        total, anonymous = peak_memory(atlas_prepare(corpus, output))
        shutil.rmtree(output)
        shown = f"{anonymous / 1e6:,.0f} MB" if anonymous else ""
        print(f"| {corpus.megabytes:,.3g} MB of text | {total / 1e6:,.0f} MB | {shown} |")
        peaks.append(total)
    print(f"the larger text needs {peaks[-1] / peaks[0] - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=300, help="of text; default 300")
    parser.add_argument("--data", type=Path, help="a text to use instead of a generated one")
    parser.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT, whose way runs too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=".", help="folder for a temporary folder with all files")
    add_record_option(parser)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = arguments.child
        print(json.dumps(CHILDREN[kind](*rest)))
        return

    with recorded("Preparing", arguments), tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary).absolute()
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
        limit = int(arguments.megabytes * 1e6)
        articles = read_articles(arguments.data, limit) if arguments.data else make_articles(folder, limit)
        corpus = Corpus.write(folder / "corpus", articles)
        small = Corpus.write(folder / "small", articles[: max(1, len(articles) // 10)])
        print(f"{len(articles):,} articles, {corpus.megabytes:,.1f} MB, {os.cpu_count()} cores")
        ways = all_ways(corpus, folder, arguments.nanogpt)
        for _ in range(arguments.rounds):
            for way in ways.values():
                way.run()
        print_speed(ways, corpus.megabytes)
        print_memory([small, corpus], folder)
        ways["atlas"].clear()
        subprocess.run(ways["atlas"].command, check=True, capture_output=True)
        check_tokens(folder / "prepared", articles, ways["tiktoken"].tokens, generated=arguments.data is None)


if __name__ == "__main__":
    main()
