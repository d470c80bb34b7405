"""Files from strangers are read, or refused in one line: no code runs, and no claimed size is believed."""

from __future__ import annotations

import bz2
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.cli import main
from atlas.cli.terminal import printable
from atlas.data import open_dataset
from atlas.data.text.formats.decode import PIECE_CHARS, as_document
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Sources
from atlas.errors import AtlasError
from atlas.files import open_zip, sha256_of
from atlas.inference import load_model
from atlas.training.checkpoint import safe_unpickle as pickled
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manifest import read_manifest, sidecar_of
from atlas.training.checkpoint.safe_unpickle import TensorClaim, read_pickle
from atlas.training.checkpoint.validate import check_optimizer_state, read_plain
from atlas.training.optimizers.build import build_optimizer
from tests.archive import documents_of, whole, write_zip
from tests.faults import attacks, fuzz
from tests.faults.attacks import ATTACKS, FIXTURE, READERS, Attack, forged, overlapping

ROOT = Path(__file__).parents[3]


def by_name(name: str) -> Attack:
    (found,) = [attack for attack in ATTACKS if attack.name == name]
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, in which code that ran would leave a file."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def _small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limit, which takes seconds to reach. The command below uses the real one."""
    monkeypatch.setattr(pickled, "MOST_VALUES", 30_000)


# The attacks made by hand


@pytest.mark.usefixtures("_small_budget")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.reader}: {attack.name}")
def test_an_attack_is_refused_in_one_line_and_leaves_nothing(attack: Attack, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    path = attack.make(folder)
    before, start = sorted(tmp_path.rglob("*")), time.monotonic()
    with pytest.raises(AtlasError) as caught:
        READERS[attack.reader](path)
    message = str(caught.value)
    pattern = ".*".join(map(re.escape, attack.says.split(" … ")))
    assert re.search(pattern, message), message
    # An error about a merged config names the setting and no file, since a flag may have set the value.
    assert str(path) in message or attack.reader == "config"
    assert "\n" not in message
    assert len(message) < 2000
    assert sorted(tmp_path.rglob("*")) == before
    assert time.monotonic() - start < 10


# The links and pipes of a folder, and what `atlas info` does not read as a file of its own.
INFORMED = [attack for attack in ATTACKS if attack.reader not in ("archive", "sidecar")]


@pytest.mark.usefixtures("_small_budget")
def test_info_answers_every_attack_with_one_line_and_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`info` may still describe a checkpoint whose tokenizer cannot be used: that is no refusal."""
    for number, attack in enumerate(INFORMED):
        folder = tmp_path / str(number)
        folder.mkdir()
        code = main(["info", str(attack.make(folder))])
        output, errors = capsys.readouterr()
        assert all(printable(line) == line for line in (output + errors).splitlines()), attack.name
        if code == 0:
            # A tokenizer or tensors that no command would use, in a file that is otherwise sound.
            assert attack.reader in ("checkpoint", "gguf", "dataset"), attack.name
            assert output
        else:
            assert (code, output, errors.count("\n")) == (2, "", 1), attack.name
            assert errors.startswith("error: ")


def test_a_zip_is_opened_in_the_memory_of_its_directory(tmp_path: Path) -> None:
    """However much a directory may take: behind a comment, where its end is searched for, too."""
    path = tmp_path / "small.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
        archive.comment = b"a comment"
    tracemalloc.start()
    try:
        open_zip(path, directory_limit=4 << 30).close()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_all_attacks_together_stay_below_a_gigabyte() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz", "--by-hand"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert counts == {reader: sum(attack.reader == reader for attack in ATTACKS) for reader in READERS}
    assert done.stdout.count("within 1 GB") == len(READERS)


# The attacks work: they harm the usual readers


def test_the_usual_loader_believes_the_sizes_and_shapes_in_a_file(tmp_path: Path) -> None:
    small = forged(attacks.call("builtins", "bytearray", attacks.number(2**24)))(tmp_path)
    assert small.stat().st_size < 1000
    assert len(torch.load(small, weights_only=True)) == 2**24
    huge = forged(attacks.PROGRAMS["2^40 numbers over one"][0])(tmp_path)
    assert torch.load(huge, weights_only=True).numel() == 2**40


def test_the_usual_readers_unpack_the_bombs(tmp_path: Path) -> None:
    bomb = attacks.bomb(tmp_path)
    with zipfile.ZipFile(bomb) as archive:
        assert len(archive.read("a.txt")) == 110_000_000 > 900 * bomb.stat().st_size
    with zipfile.ZipFile(overlapping(tmp_path)) as archive:
        assert (
            sum(member.compress_size for member in archive.infolist()) > (tmp_path / "a.zip").stat().st_size
        )
    packed = bz2.compress(bytes(40_000_000))
    assert len(packed) < 100  # zipfile reads 40 times as much in one call, and unpacks all of it
    merged = yaml.safe_load(attacks.MERGES[: attacks.MERGES.index("a7:")])
    assert len(merged) == 7  # in 300 bytes, 9^6 pairs on the way


def test_a_sidecar_vouched_for_its_neighbours_file(tmp_path: Path) -> None:
    """By name and hash it still does. What counts is whether it describes the file beside it."""
    evil = attacks.vouching_for_another(tmp_path)
    entry = json.loads(sidecar_of(evil).read_text(encoding="utf-8"))["files"][0]
    assert sha256_of(tmp_path / entry["name"]) == entry["sha256"]
    assert read_manifest(evil, check_hash=True) is None


def test_an_optimizer_state_that_does_not_fit_is_refused_before_a_kernel_writes_beyond_it() -> None:
    loaded = load_model(FIXTURE)
    state = attacks.sound_contents()["optimizer_state_dict"]
    optimizer = build_optimizer(loaded.model, loaded.config.training)
    check_optimizer_state(optimizer, state)
    check_optimizer_state(optimizer, optimizer.state_dict())  # of a run that made no update yet
    less = [{k: v for k, v in group.items() if k != "capturable"} for group in state["param_groups"]]
    check_optimizer_state(optimizer, {**state, "param_groups": less})  # of another version of PyTorch

    def changed(number: int, **entries: object) -> dict[str, object]:
        return {**state, "state": {**state["state"], number: {**state["state"][number], **entries}}}

    def regrouped(**entries: object) -> dict[str, object]:
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, **entries}, *others]}

    for wrong in (
        {},
        {"state": {}, "param_groups": [None, None]},
        {**state, "state": {0: {}, "x": {}}},
        {**state, "state": {0: {"exp_avg": torch.zeros(3)}}},
        changed(0, exp_avg=torch.zeros(3)),
        changed(0, exp_avg=torch.tensor(0.0)),
        changed(3, exp_avg_sq=0.0),
        changed(3, step=torch.zeros(3)),
        changed(3, step=torch.tensor(3)),
        changed(3, more=torch.zeros(1)),
        regrouped(params=[0]),
        regrouped(params=list("abcdefghij")),
        regrouped(betas=("a", "b")),
        regrouped(lr="fast"),
        regrouped(maximize=True),
        regrouped(fused="yes"),
        regrouped(lr=torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match=r"it|parameter"):
            check_optimizer_state(optimizer, wrong)


# Honest files are still read


def test_a_checkpoint_is_read_as_pytorch_reads_it() -> None:
    ours, theirs = read_plain(FIXTURE, remedy=""), torch.load(FIXTURE, weights_only=True)
    assert_same(ours, theirs)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


@given(value=PLAIN, seed=st.integers(0, 2**32), sizes=st.lists(st.integers(0, 4), max_size=4))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_values_come_back_from_what_torch_save_writes(
    value: object, seed: int, sizes: list[int], tmp_path: Path
) -> None:
    """Compared with `torch.load`: values, shapes, types, and views that share a storage."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.rand([2, *(size + 1 for size in sizes)], generator=generator).to(DTYPES[seed % len(DTYPES)])
    tensors = [whole, whole[1], whole.transpose(0, -1), whole[..., :0], torch.zeros(sizes)]
    torch.save({"value": value, "tensors": tensors, "twice": [tensors, tensors]}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:

        def build(claim: TensorClaim) -> torch.Tensor:
            assert claim.is_inside
            content = bytearray(archive.read(f"x/data/{claim.storage.key}")) or bytearray(8)
            flat = torch.frombuffer(content, dtype=claim.storage.dtype)
            return flat.as_strided(claim.size, claim.stride, claim.offset)

        ours = read_pickle(archive.read("x/data.pkl"), build)
    assert_same(ours, torch.load(tmp_path / "x.pt", weights_only=True))


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(ours, type(theirs))
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs or (ours != ours and theirs != theirs)
        assert type(ours) is type(theirs)


def test_the_sound_files_of_all_readers_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(attacks.sound_tokenizer(), encoding="utf-8")
    (tmp_path / "c.yaml").write_text(attacks.SOUND_CONFIG, encoding="utf-8")
    (tmp_path / "m.gguf").write_bytes(attacks.sound_gguf())
    sound = {
        "archive": write_zip(tmp_path / "a.zip", {"a.txt": "words"}),
        "checkpoint": FIXTURE,
        "sidecar": FIXTURE,
        "dataset": attacks.sound_dataset(),
        "tokenizer": tmp_path / "tokenizer.json",
        "config": tmp_path / "c.yaml",
        "gguf": tmp_path / "m.gguf",
        "first-version": attacks.sound_old_checkpoint(),
    }
    assert set(sound) == set(READERS)
    for reader, path in sound.items():
        READERS[reader](path)


def test_a_checkpoint_and_its_sidecar_may_be_renamed_together(tmp_path: Path) -> None:
    shutil.copy(FIXTURE, tmp_path / "mine.pt")
    shutil.copy(sidecar_of(FIXTURE), tmp_path / "mine.json")
    assert load_checkpoint(tmp_path / "mine.pt")["step"] == 40
    assert load_model(tmp_path / "mine.pt").config.model.num_layers == 2


def test_repetitive_text_is_no_bomb_and_a_bomb_may_be_trusted(tmp_path: Path) -> None:
    log = b"GET /index.html 200\n" * 300_000
    assert len(log) > 200 * write_zip(tmp_path / "log.zip", {"log.txt": log}).stat().st_size
    assert documents_of(tmp_path / "log.zip") == [log.decode()]
    bomb = attacks.bomb(tmp_path)
    with pytest.raises(AtlasError, match="--trust-archives"):
        Sources([bomb])
    with pytest.raises(AtlasError, match=r"1 file is left out, 110\.00 MB: a binary file"):
        Sources([bomb], trust_archives=True)  # it is opened: its text is zeros


def test_trust_applies_to_sizes_not_to_paths(tmp_path: Path) -> None:
    for name in ("path: parent", "members over each other", "bzip2, gigabytes at once", "encrypted"):
        path = by_name(name).make(tmp_path)
        with pytest.raises(AtlasError):
            Sources([path], trust_archives=True)


def test_prepare_takes_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.data.text.archives.RATIO_FREE_BYTES", 1000)
    path = write_zip(tmp_path / "a.zip", {"a.txt": "many words " * 5000})
    arguments = [
        "prepare",
        "--input",
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--train-tokenizer",
        "300",
    ]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--trust-archives"]) == 0
    assert open_dataset(tmp_path / "out", verify=True).manifest.splits["train"].documents == 1


def test_links_that_stay_inside_a_folder_are_read_once_and_others_are_reported(tmp_path: Path) -> None:
    given = attacks.links_out(tmp_path)
    (given / "own.txt").write_text("own words", encoding="utf-8")
    (given / "again.txt").symlink_to(given / "own.txt")
    sources = Sources([given])
    assert whole(sources.documents()) == ["own words"]
    assert any("2 links that lead out" in note for note in sources.notes(SourceReport()))
    assert documents_of(given / "a.txt") == ["secret"]  # the user named it, so it is read


def test_a_link_in_a_zip_is_not_text(tmp_path: Path) -> None:
    path = attacks.link_in_zip(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.txt", "words")
    assert documents_of(path) == ["words"]
    assert Sources([path]).skipped.links == [f"{path}/passwords.txt"]


def test_a_document_that_ends_in_blanks_ends() -> None:
    text = "x" * PIECE_CHARS + "\n"
    pieces = list(as_document([text]))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False, True]


def test_a_megabyte_of_blanks_is_not_held(tmp_path: Path) -> None:
    """In the archive's layout blank lines separate articles, so they used to be held until something followed."""
    from atlas.data.text.formats.wikipedia import ArticleReport, split_articles

    chunks = ["Title\n\nWords."] + [" " * (1 << 20)] * 9 + ["\n\n\nNext\n\nWords."]
    given, taken, held = 0, 0, []

    def counted() -> Iterator[str]:
        nonlocal given
        for chunk in chunks:
            given += len(chunk)
            yield chunk

    for piece in split_articles(counted(), ArticleReport()):
        held.append(given - taken)
        taken += len(piece.text)
    assert max(held) <= 6 * PIECE_CHARS
    found = whole(split_articles(chunks, ArticleReport()))
    assert "".join(found).split() == ["Title", "Words.", "Next", "Words."]


def test_control_characters_in_a_line_are_shown_and_not_executed() -> None:
    assert printable("plain, é, 漢, 🙂 ⏎") == "plain, é, 漢, 🙂 ⏎"
    assert printable("\x1b[31m\ud800\u202e\x07") == r"\x1b[31m\ud800\u202e\x07"
    assert len(printable("x" * 10**6)) < 3000


# Changed at random


@pytest.mark.usefixtures("_small_budget")
@pytest.mark.parametrize("reader", list(READERS))
@given(content=st.binary(max_size=48))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sound_file_with_changes_is_read_or_refused(
    reader: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fuzz.attempt(reader, content, tmp_path_factory.mktemp("fuzz"))


def test_the_changes_reach_both_outcomes(tmp_path: Path) -> None:
    """Files that are all refused at the first byte, or all sound, would test nothing."""
    outcomes = {reader: set() for reader in READERS}
    for reader in READERS:
        for number in range(200):
            folder = tmp_path / f"{reader}{number}"
            folder.mkdir()
            outcomes[reader].add(fuzz.attempt(reader, bytes([number, number * 7 % 256] * 20), folder))
            if len(outcomes[reader]) == 2:
                break
    assert outcomes == {reader: {True, False} for reader in READERS}
