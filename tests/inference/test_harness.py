"""`atlas evaluate --tasks`: lm-eval gets the same values as from its own adapter with the same weights."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from atlas.cli import main
from atlas.errors import AtlasError
from atlas.export.huggingface import export_hf
from atlas.inference.harness import HarnessModel
from atlas.inference.load import LoadedModel, load_model
from atlas.tokenizer import Tokenizer
from tests.conftest import SENTENCES, corpus
from tests.export.test_export import save_checkpoint

CONTEXT = 48
LONG = " ".join(SENTENCES)
PAIRS = [
    ("The river", " runs past the old mill"),
    ("The river ", "runs"),
    ("The river \n", " runs"),
    ("", "The river runs."),
    ("", " a"),
    ("naïve 漢", "字 🙂"),
    ("They count the rings", " until"),
    ("They count the rings", " until the surface"),
    ("They count the rings", " and"),
    (LONG, " The river"),
    (LONG + " ", "A small boat waits."),
    ("A small boat", " waits where the reeds"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train([corpus(), "naïve 漢字 🙂 " * 20], 400)
    return save_checkpoint(tmp_path_factory.mktemp("harness") / "run", tokenizer)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def theirs(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = export_hf(loaded.model, loaded.tokenizer, tmp_path_factory.mktemp("hf") / "out")
    return HFLM(pretrained=str(folder), device="cpu", batch_size=4)


@pytest.fixture(autouse=True)
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Block the network and the user's cache. Holds the attempts to reach the network."""
    made: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        made.append(arguments)
        raise socket.gaierror("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return made


def asked(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]  # type: ignore[arg-type]


def likeliest_pairs(loaded: LoadedModel) -> list[tuple[str, str]]:
    """Contexts with the model's likeliest token, if it stays a separate token, and with an unlikely token added."""
    encode, pairs = loaded.tokenizer.encode, []
    words = corpus(200).split()
    for end in range(3, 60):
        context = " ".join(words[end - 3 : end])
        ids = encode(context)
        token = int(loaded.model(torch.tensor([ids]))[0, -1].argmax())
        text = loaded.tokenizer.decode([token])
        if encode(context + text) == [*ids, token]:
            pairs += [(context, text), (context, text + " 漢")]
    return pairs


def test_log_likelihoods_equal_those_of_lm_evals_own_adapter(loaded: LoadedModel, theirs: HFLM) -> None:
    requests = asked("loglikelihood", PAIRS + likeliest_pairs(loaded))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert {greedy for _, greedy in expected} == {True, False}
    for batch_size in (1, 3, 8):
        answers = HarnessModel(loaded, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
        assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_rolling_log_likelihoods_equal_those_of_lm_evals_own_adapter(
    loaded: LoadedModel, theirs: HFLM
) -> None:
    texts = ["", "The", SENTENCES[0], LONG, corpus(100), LONG[:90]]
    assert len(loaded.tokenizer.encode(corpus(100))) > 3 * CONTEXT
    requests = asked("loglikelihood_rolling", [(text,) for text in texts])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    for batch_size in (1, 8):
        answers = HarnessModel(loaded, batch_size=batch_size).loglikelihood_rolling(requests)
        assert answers == pytest.approx(expected, abs=1e-3, rel=1e-6)


def test_greedy_texts_equal_those_of_lm_evals_own_adapter(loaded: LoadedModel, theirs: HFLM) -> None:
    contexts = ["The river", "A small boat waits", LONG, "naïve", "They count the rings until"]
    freely = {"until": [], "max_gen_toks": 20, "do_sample": False}
    whole = theirs.generate_until(asked("generate_until", [(text, freely) for text in contexts]))
    assert len(loaded.tokenizer.encode(LONG)) > CONTEXT
    # Stop strings from the generated texts; in other texts they lie inside words and span tokens.
    stops = [text[len(text) // 2 :][:3] for text in whole]
    requests = asked(
        "generate_until",
        [
            (text, options)
            for text in contexts
            for options in (
                freely,
                {"until": stops, "max_gen_toks": 20},
                {"until": stops[0], "max_gen_toks": 30, "temperature": 0.0},
                {
                    "until": ["\n"],
                    "max_new_tokens": 5,
                    "temperature": 1.0,
                    "do_sample": False,
                    "num_beams": 1,
                },
            )
        ],
    )
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert expected[::4] == whole
    assert all(len(short) < len(long) for short, long in zip(expected[1::4], whole, strict=True))
    for batch_size in (1, 8):
        answers = HarnessModel(loaded, batch_size=batch_size).generate_until(requests)
        assert answers == expected


def test_samples_do_not_depend_on_the_batch(loaded: LoadedModel) -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_k": 20}
    requests = asked("generate_until", [(text, options) for text in ("The river", "A small", "The river")])
    alone, together = (HarnessModel(loaded, batch_size=size).generate_until(requests) for size in (1, 8))
    assert alone == together
    assert alone[0] != alone[2]
    del options["do_sample"]  # a temperature implies it
    assert HarnessModel(loaded, batch_size=8).generate_until(requests) == alone


def greedily(loaded: LoadedModel, prompt: str, stop: str, max_tokens: int) -> str:
    """The greedy continuation, with a full forward pass per token."""
    ids = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eos_id]
    start = len(ids)
    for _ in range(max_tokens):
        ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    return loaded.tokenizer.decode(ids[start:]).split(stop)[0]


def test_a_text_may_be_longer_than_the_context(loaded: LoadedModel) -> None:
    """A prompt may be empty. lm-eval's own adapter refuses both."""
    requests = asked("generate_until", [("", {"max_gen_toks": 3 * CONTEXT}), ("", {"max_gen_toks": 10})])
    long, short = HarnessModel(loaded, batch_size=8).generate_until(requests)
    assert len(loaded.tokenizer.encode(long)) > CONTEXT
    assert short == greedily(loaded, "", "\0", 10)
    assert long.startswith(short)


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("loglikelihood", ("The riv", "er"), "'er' after 'The riv' has no token of its own"),
        ("loglikelihood", ("The river", LONG), "tokens is longer than the model's context of 48"),
        ("generate_until", ("The river", {"num_beams": 4, "min_p": 0.1}), "asks for num_beams, min_p, which"),
        ("generate_until", ("The river", {"do_sample": True, "top_p": 2.0}), "top-p 2.0: must be"),
    ],
)
def test_an_unsupported_request_is_refused(
    loaded: LoadedModel, kind: str, arguments: tuple[Any, ...], reason: str
) -> None:
    with pytest.raises(AtlasError, match=reason):
        getattr(HarnessModel(loaded, batch_size=8), kind)(asked(kind, [arguments]))


# The command

CHOICES = """\
task: verses
dataset_path: json
dataset_kwargs: {data_files: {test: verses.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
metadata: {version: 1}
"""

WRITING = """\
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: writing.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["as"], max_gen_toks: 10}
metric_list: [{metric: exact_match, aggregation: mean}]
"""

ENDING = """\
task: ending
dataset_path: json
dataset_kwargs: {data_files: {test: writing.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
"""

READING = """\
task: reading
dataset_path: json
dataset_kwargs: {data_files: {test: writing.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}}"
"""


def verses() -> list[dict[str, Any]]:
    rows = []
    for number, sentence in enumerate(SENTENCES * 4):
        words = sentence.split()
        at = 2 + number % 4
        ends = [" ".join(words[at : at + 2]), "the stone boat", "12", "nobody " * (1 + number % 3)]
        rows.append({"start": " ".join(words[:at]), "ends": ends, "right": number % 4})
    return rows


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, loaded: LoadedModel
) -> list[str]:
    """A folder of tasks, and the command that evaluates a model."""
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    for name, text in (("verses", CHOICES), ("writing", WRITING), ("reading", READING)):
        Path(f"tasks/{name}.yaml").write_text(text, encoding="utf-8")
    write_rows("verses.jsonl", verses())
    starts = [" ".join(sentence.split()[:4]) for sentence in SENTENCES]
    ends = [greedily(loaded, start, "as", 10) for start in starts]
    assert all(ends)
    ends[1:3] = ["wrong", "wrong"]
    write_rows("writing.jsonl", [{"start": s, "end": e} for s, e in zip(starts, ends, strict=True)])
    return ["evaluate", "--checkpoint", str(checkpoint), "--device", "cpu", "--tasks"]


def table(said: str) -> dict[tuple[str, str], list[str]]:
    """{(task, metric): the other cells}."""
    header, *rows = (line.split() for line in said.splitlines())
    assert header == ["task", "metric", "value", "±", "examples", "shots"]
    return {(row[0], row[1]): row[2:] for row in rows}


def log_probability(loaded: LoadedModel, start: str, end: str) -> float:
    """The log-probability of ` end` after `start`, token by token."""
    before, ids = (loaded.tokenizer.encode(text) for text in (start, f"{start} {end}"))
    log_probs = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(len(before), len(ids)))


@torch.inference_mode()
def test_the_command_scores_tasks_in_files(
    command: list[str],
    loaded: LoadedModel,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    attempts: list[object],
) -> None:
    assert main([*command, "tasks"]) == 0
    said = capsys.readouterr()
    assert said.err == caplog.text == ""
    assert attempts == []
    scores = table(said.out)
    rows = verses()
    right = 0
    for row in rows:
        values = [log_probability(loaded, row["start"], end) for end in row["ends"]]
        right += values.index(max(values)) == row["right"]
    assert 0 < right < len(rows)
    assert scores["verses", "acc"][0] == f"{right / len(rows):.4f}"
    assert scores["verses", "acc"][2:] == ["20", "0"]
    assert scores["writing", "exact_match"][0] == f"{3 / 5:.4f}"
    assert scores["writing", "exact_match"][2:] == ["5", "0"]
    eos = loaded.tokenizer.eos_id
    total = bytes_ = 0.0
    for start in (" ".join(sentence.split()[:4]) for sentence in SENTENCES):
        ids = [eos, *loaded.tokenizer.encode(start)]
        log_probs = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)
        total += sum(float(log_probs[place, id]) for place, id in enumerate(ids[1:]))
        bytes_ += len(start.encode())
    bits = -total / bytes_ / torch.tensor(2.0).log().item()
    assert float(scores["reading", "bits_per_byte"][0]) == pytest.approx(bits, abs=1e-3)


def test_the_command_reports_the_scores_of_lm_evals_own_command(
    command: list[str], theirs: HFLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few-shot examples drawn by a seed, with files given by name, in any batch."""
    files = ["tasks/verses.yaml", "tasks/writing.yaml", "tasks/ending.yaml"]
    Path("tasks/ending.yaml").write_text(ENDING, encoding="utf-8")
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # runs pip for seconds
    expected = evaluator.simple_evaluate(
        theirs,
        tasks=files,
        num_fewshot=1,
        limit=4,
        bootstrap_iters=1000,
        task_manager=TaskManager(include_defaults=False),
    )
    capsys.readouterr()
    arguments = [*command, ", ".join(files), "--num-fewshot", "1", "--limit", "4"]
    for batch_size in ("1", "8"):
        assert main([*arguments, "--batch-size", batch_size]) == 0
        scores = table(capsys.readouterr().out)
        assert {task for task, _ in scores} == {"verses", "writing", "ending"}
        for (task, metric), cells in scores.items():
            values = expected["results"][task]
            assert float(cells[0]) == pytest.approx(values[f"{metric},none"], rel=1e-4, abs=6e-5)
            assert float(cells[1]) == pytest.approx(values[f"{metric}_stderr,none"], rel=1e-4, abs=6e-5)
            assert cells[2:] == ["4", "1"]


def test_a_group_has_its_mean(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Its tasks, which lie in the same folder, are listed once."""
    Path("group").mkdir()
    Path("group/river.yaml").write_text(
        "group: river\ntask: [few, many]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
        encoding="utf-8",
    )
    for name, file in (("few", "few.jsonl"), ("many", "verses.jsonl")):
        text = CHOICES.replace("task: verses", f"task: {name}").replace("verses.jsonl", file)
        Path(f"group/{name}.yaml").write_text(text, encoding="utf-8")
    write_rows("few.jsonl", verses()[:4])
    assert main([*command, "group"]) == 0
    said = capsys.readouterr().out
    scores = table(said)
    assert len([line for line in said.splitlines() if line.split()[1] == "acc"]) == 3
    few, many, both = (float(scores[name, "acc"][0]) for name in ("few", "many", "river"))
    assert few != many
    assert both == pytest.approx((4 * few + 20 * many) / 24, abs=1e-4)
    assert scores["river", "acc"][2] == "24"


def test_a_terminal_sees_bars_and_a_pipe_the_table(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where lm-eval prints, as before it resamples for the error of a perplexity."""
    Path("tasks/ending.yaml").write_text(ENDING, encoding="utf-8")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*command, "tasks/ending.yaml"]) == 0
    said = capsys.readouterr()
    scores = table(said.out)
    assert float(scores["ending", "perplexity"][1]) > 0
    assert "answering" in said.err


# Errors


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("verses.jsonl", "missing.jsonl"), "its data cannot be loaded (FileNotFoundError: Unable to find"),
        (("dataset_path: json", "dataset_path: nobody/verses"), "its data cannot be loaded (ConnectionError"),
        (("{{start}}", "{{question}}"), "cannot be loaded (UndefinedError: 'question' is undefined"),
        (("test_split", "test_part"), "cannot be loaded (TypeError"),
        (("task: verses", "name: verses"), "cannot be loaded (ValueError: Unknown config shape"),
        (("metadata:", "unsafe_code: true\nmetadata:"), "--tasks verses: runs code that the model generates"),
        (("metadata:", "doc_to_image: [start]\nmetadata:"), "--tasks verses: shows images"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_line(
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    reason: str,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts to reach the network
    assert change[0] in CHOICES
    Path("tasks/verses.yaml").write_text(CHOICES.replace(*change), encoding="utf-8")
    assert reason in refused([*command, "tasks/verses.yaml"], capsys)


@pytest.mark.slow
def test_an_unknown_task_is_one_line_with_the_nearest(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused([*command, "helaswag"], capsys)
    assert "--tasks helaswag: is neither a task of lm-eval nor an existing file" in error
    assert "did you mean hellaswag?" in error


def test_without_the_extra_the_error_has_the_remedy(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'needs lm-eval: pip install "atlas-llm[eval]"' in refused([*command, "tasks"], capsys)
