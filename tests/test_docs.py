"""The documentation is true: its commands and Python run, and its links, flags, settings, files and figures are right.

All blocks of all pages run in one folder, in the order in which a newcomer would read them. So a block can use the
files of earlier blocks. `shrink` makes a command small; nothing else changes one.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from atlas.cli import COMMANDS, FUNCTIONS, main
from atlas.config import AtlasConfig
from atlas.config.loader import check_keys, fields, nested, read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.inference.sampling import Sampling, penalize_repetition, probabilities
from atlas.model import AtlasLM
from atlas.planning.advice import GOOD_PASSES, TOKENS_PER_PARAMETER
from atlas.training.memory.estimate import checkpoint_bytes, estimate_training_memory, output_folder_bytes
from atlas.training.memory.presets import assume_vocabulary
from tests.archive import kaggle_files, write_zip
from tests.conftest import SENTENCES, corpus

ROOT = Path(__file__).parents[1]

FIRST_READ = ("README", "FAQ", "TRAINING", "INFERENCE", "EXPORT", "ARCHITECTURE", "CONFIG", "CONTRIBUTING")
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md")],
    key=lambda page: (FIRST_READ.index(page.stem) if page.stem in FIRST_READ else len(FIRST_READ), page.stem),
)

SCRIPTS = {
    "scripts/prepare_data.py": "prepare",
    "scripts/train.py": "train",
    "scripts/infer.py": "generate",
    "scripts/export_gguf.py": "export",
    "./scripts/run_pipeline.sh": "pipeline",
    "./scripts/run_pipeline.ps1": "pipeline",
}

OTHER_TOOLS = re.compile(
    r"git (clone|commit|add|push|checkout|switch) |cd |python -m venv |source |pip install |pre-commit |nvidia-smi$"
    r"|torchrun .*-m atlas doctor |sbatch |kubectl "
    r"|pytest |ruff |curl |mypy|\./scripts/(run_pipeline|test)\.sh|llama-(completion|server|quantize) |ollama "
)
"""Lines in the pages that this test does not run."""

DOCUMENTED_STEPS, STEPS = 5000, 4
"""A run of `DOCUMENTED_STEPS` updates in the pages has `STEPS` here."""


# Reading the pages


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of its fence."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    fence, body, start = "", [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if fence:
                yield Block(page, start, fence, "\n".join(body))
                fence = ""
            else:
                fence, body, start = line.strip().strip("`") or "text", [], number
        elif fence:
            body.append(line)
    assert not fence, f"{page.name}:{start}: the block is not closed"


@functools.cache
def prose_of(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page))


def command_lines(block: Block) -> list[str]:
    """The commands of a shell block, with continued lines joined, and without comments and empty lines."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [line.strip() for line in joined.splitlines()]
    commands = [part.strip() for line in lines if not line.startswith("#") for part in line.split(" && ")]
    return [command for command in commands if command]


# Running them


def shrink(command: str, arguments: list[str]) -> list[str]:
    """The same command at a size that takes no time: later arguments override earlier ones."""
    arguments = [re.sub(r"atlas_step_\d+", "atlas_step_2", argument) for argument in arguments]
    settings = {
        "model.hidden_size": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.max_seq_len": 32,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 2,
        "training.max_steps": STEPS,
        "training.warmup_steps": 1,
        "training.eval_interval": 2,
        "training.eval_sequences": 4,
        "tracking.sample_tokens": 4,
        "training.precision": "auto",
        "checkpoint.save_interval": 2,
        "checkpoint.background": False,  # updates take milliseconds, and none may be dropped
        "data.num_workers": 0,
        "device": "cpu",
    }
    if command == "train":
        if "--max-steps" in arguments:
            documented = int(arguments[arguments.index("--max-steps") + 1])
            settings["training.max_steps"] = max(1, documented * STEPS // DOCUMENTED_STEPS)
        flags = {key.rsplit(".", 1)[-1]: value for key, value in settings.items()}
        for name in ("batch_size", "max_steps", "save_interval", "eval_interval", "device"):
            arguments += [f"--{name.replace('_', '-')}", str(flags[name])]
    if command in ("train", "pipeline"):
        return arguments + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if command == "generate":
        return [*arguments, "--max-tokens", "4", "--device", "cpu"]
    if command in ("evaluate", "look"):
        return [*arguments, "--device", "cpu"]
    if command == "export":
        return [*arguments, "--no-verify"]  # the proof has its own tests
    return arguments


def run_command(line: str, capture: pytest.CaptureFixture[str]) -> None:
    """Run one documented line here, in this process. It must succeed and write the file that it names. A torchrun line
    runs as one process; tests/training/devices/test_distributed.py starts several."""
    words = shlex.split(re.sub(r"torchrun .* -m (?=atlas )", "", line), comments=True)
    with pytest.MonkeyPatch.context() as patch:
        while "=" in words[0]:
            patch.setenv(*words.pop(0).split("=", 1))
        script = words[1] if words[0] == "python" else None
        words = words[2:] if script else words[1:]
        command = SCRIPTS[script] if script else words.pop(0)
        target = words[words.index(">") + 1] if ">" in words else None
        arguments = shrink(command, words[: words.index(">")] if target else words)
        patch.setattr(sys, "stdin", io.StringIO("The river\n"))
        capture.readouterr()
        if command == "serve":
            SERVERS.append(start_server(arguments))
            return
        code = run_script(ROOT / script, arguments, patch) if script else main([command, *arguments])
    said = capture.readouterr()
    assert code == 0, f"exit code {code}\n{said.err}"
    assert "Traceback" not in said.err
    if target:
        Path(target).write_text(said.out, encoding="utf-8")
    for flag, written in itertools.pairwise(arguments):
        if flag in ("--output", "--output-file"):
            assert Path(written).exists()
    if command == "generate" and "--prompt" in arguments and not {"--num-samples", "--chat"} & {*arguments}:
        assert said.out.startswith(arguments[arguments.index("--prompt") + 1])
    if command == "train" and not {"--overfit-batch", "--profile"} & {*arguments}:
        folder = (
            arguments[arguments.index("--output-dir") + 1] if "--output-dir" in arguments else "checkpoints"
        )
        assert (Path(folder) / "atlas_best.pt").exists()
        assert re.search(r"finished at step|nothing to do: the run is complete", said.err)


SERVERS: list[tuple[subprocess.Popen[str], str]] = []
"""Servers that a page has started, and their addresses: they run until all pages are done."""


def start_server(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port and wait until it is ready."""
    command = [sys.executable, "-m", "atlas", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.match(r"http://\S+", line):
            return server, found[0]
    raise AssertionError("".join(said))


def stop_servers() -> None:
    while SERVERS:
        server, _ = SERVERS.pop()
        server.terminate()
        assert server.wait(30) == 0
        assert server.stderr is not None
        server.stderr.close()


def run_script(path: Path, arguments: list[str], patch: pytest.MonkeyPatch) -> int:
    patch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert isinstance(stop.value.code, int)
    return stop.value.code


def write_named_file(block: Block) -> bool:
    """Write a block whose first line is `# some/file` to that file."""
    named = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", block.text)
    if named:
        Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(named[1]).write_text(block.text + "\n", encoding="utf-8")
    return named is not None


def run_block(block: Block, namespace: dict[str, Any], capture: pytest.CaptureFixture[str]) -> None:
    if block.language == "bash":
        for line in command_lines(block):
            if not OTHER_TOOLS.match(line):
                known = r"([A-Z_]+=\S+ )*(torchrun .*-m atlas train |atlas |python scripts/)"
                assert re.match(known, line), f"not known here: {line}"
                run_command(line, capture)
    elif block.language == "python":
        if not write_named_file(block) and not is_not_run(block):
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(Path.cwd())  # as Python does for the folder of a script
                text = block.text.replace("http://127.0.0.1:8000", SERVERS[-1][1] if SERVERS else "")
                exec(compile(text, block.place, "exec"), namespace)
    elif block.language == "yaml":
        write_named_file(block)


def is_not_run(block: Block) -> bool:
    return block.language == "python" and block.text.startswith("# not run")


def furnish(folder: Path) -> None:
    """Create what the pages expect a reader to have: the archive, texts, prompts, and a checkout's presets."""
    for name in ("data/raw", "data/processed/your_data", "my_texts", "letters"):
        (folder / name).mkdir(parents=True)
    write_zip(folder / "data/raw/archive.zip", kaggle_files())
    for number, sentence in enumerate(SENTENCES * 5):
        text = f"{sentence} Page {number}.\n" * 8
        (folder / f"data/processed/your_data/page{number}.txt").write_text(text, encoding="utf-8")
    (folder / "my_texts/river.txt").write_text(corpus(1000), encoding="utf-8")
    (folder / "my_texts/mill.md").write_text("# The mill\n\n" + corpus(500), encoding="utf-8")
    (folder / "letters/mill.txt").write_text(corpus(600), encoding="utf-8")
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{" ".join(SENTENCES)}"}}\n' * 20, encoding="utf-8")
    (folder / "prompts.txt").write_text("The river\n\nA small boat\n", encoding="utf-8")
    page = (ROOT / "docs/TRAINING.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\{"(?:prompt|messages)".*\n', page, re.MULTILINE)
    rows.append('{"prompt": "The river?", "response": "Past."}\n')  # fits the context of 32 tokens
    (folder / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    question = '{"question": "The river runs past the old", "answers": ["mill", "moon"], "right": 0}\n'
    (folder / "rivers.jsonl").write_text(question * 3, encoding="utf-8")
    shutil.copytree(ROOT / "configs", folder / "configs")


def set_aside_first_run() -> None:
    """Move the first model, which the README trains, out of `checkpoints/`, so that the other pages can train larger
    ones."""
    aside = Path("checkpoints").rename("checkpoints_of_the_readme")
    Path("checkpoints").mkdir()
    for folder in [path for path in aside.iterdir() if path.is_dir()]:
        folder.rename(Path("checkpoints", folder.name))


def test_what_the_pages_show_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    try:
        for page in PAGES:
            if page.stem == "FAQ":
                set_aside_first_run()
            namespace: dict[str, Any] = {"__name__": page.stem}
            for block in blocks_of(page):
                try:
                    run_block(block, namespace, capsys)
                except BaseException as error:
                    raise AssertionError(f"{block.place}: {error}") from error
    finally:
        stop_servers()


def test_few_python_blocks_are_not_run() -> None:
    assert sum(is_not_run(block) for page in PAGES for block in blocks_of(page)) == 0


def test_every_block_names_its_language() -> None:
    languages = Counter(block.language for page in PAGES for block in blocks_of(page))
    assert set(languages) <= {"bash", "python", "yaml", "text"}
    assert languages["bash"] > 20


def test_configs_that_the_pages_show_are_configs(tmp_path: Path) -> None:
    for page in PAGES:
        blocks = (block for block in blocks_of(page) if block.language == "yaml")
        for number, block in enumerate(block for block in blocks if not block.text.startswith("# tasks/")):
            file = tmp_path / f"{page.stem}{number}.yaml"
            file.write_text(block.text, encoding="utf-8")
            resolve(read_yaml(file))


# Names in the pages


def slug(heading: str) -> str:
    """The anchor that GitHub makes from a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose_of(page), re.M):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    app = typer.Typer(add_completion=False)
    place = FUNCTIONS.get(command, command)
    app.command()(getattr(importlib.import_module(f"atlas.cli.{place}"), place))
    options = typer.main.get_command(app).params
    return frozenset(
        {"--help", *(flag for option in options for flag in (*option.opts, *option.secondary_opts))}
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist(page: Path) -> None:
    """A single flag must belong to some command, a flag after a command to that command."""
    anywhere = frozenset({"--version"}).union(*map(flags_of, COMMANDS))
    unknown = []
    for span in code_spans(page):
        words = span.split()
        if words[0] == "python":
            words = words[1:]
        if words[0] in SCRIPTS:
            known = flags_of(SCRIPTS[words[0]])
        elif words[0] == "atlas" and len(words) > 1 and words[1] in COMMANDS:
            known = flags_of(words[1])
        elif words[0] == "atlas" or words[0].startswith("--"):
            known = anywhere
        else:
            continue
        unknown += [f"{span}: {flag}" for flag in re.findall(r"(?<!\S)--[a-z-]+", span) if flag not in known]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    named = {match[1] for span in code_spans(page) if (match := re.match(r"atlas ([a-z]\w*)", span))}
    planned = {"import", "serve", "look", "bench"}
    assert named - COMMANDS.keys() <= (planned if page.stem in ("ARCHITECTURE", "CHANGELOG") else set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_exist(page: Path) -> None:
    sections = {key.split(".")[0] for key in fields() if "." in key}
    setting = re.compile(rf"((?:{'|'.join(sections)})\.\w+)(?:=.*|: .*)?")
    spans = [span.removeprefix("--set ") for span in code_spans(page)]
    named = {match[1] for span in spans if (match := setting.fullmatch(span))}
    for name in named - {"training.log", "model.safetensors"}:
        if not name.endswith(".py"):
            check_keys(nested(name, None), page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_the_repository_exist(page: Path) -> None:
    path = re.compile(r"(?:\./)?((?:atlas|tests|scripts|configs|docs|benchmarks)/[\w./-]*)")
    made_by_readers = {"configs/my_config.yaml"}
    named = {match[1] for span in code_spans(page) if (match := path.fullmatch(span))}
    assert {name for name in named - made_by_readers if not (ROOT / name).exists()} == set()


# Figures in the pages


Table = list[list[str]]


def tables_of(page: Path) -> list[Table]:
    """The tables of a page, each with its header as first row."""
    tables = []
    for lines in re.findall(r"(?:^\|.+\|\s*\n?)+", prose_of(page), re.M):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines.strip().splitlines()]
        tables.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return tables


def number_of_parameters(config: AtlasConfig) -> int:
    with torch.device("meta"):
        return AtlasLM(config.model).num_parameters()


FIGURES: dict[str, tuple[str, float, Callable[[AtlasConfig], float]]] = {
    "parameters": ("M", 1e6, number_of_parameters),
    "training memory, estimated": (
        "GiB",
        2**30,
        lambda config: estimate_training_memory(config, device="cuda").total,
    ),
    "one checkpoint": ("GB", 1e9, checkpoint_bytes),
    "at most, all kinds": ("GB", 1e9, output_folder_bytes),
    "text for it, at least": (
        "M tokens",
        1e6,
        lambda config: TOKENS_PER_PARAMETER * number_of_parameters(config) / GOOD_PASSES,
    ),
}
"""The columns of a table of presets: their unit, and the function that computes the figure."""


def preset_cells(page: Path) -> Iterator[tuple[str, str, str]]:
    """(preset, column, cell) for each figure of a preset in a page."""
    for header, *rows in tables_of(page):
        for first, *cells in rows:
            for preset in set(re.findall(r"`([\w-]+)`", first)) & set(preset_names()):
                for column, cell in zip(header[1:], cells, strict=True):
                    if column in FIGURES:
                        yield preset, column, cell


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_of_presets_are_true(page: Path) -> None:
    """A preset that uses the vocabulary of its data has a size only for a given one, which the page states."""
    wrong = []
    for preset, column, cell in preset_cells(page):
        unit, scale, true = FIGURES[column]
        config = resolve(read_yaml(preset_path(preset)))
        if column == "parameters" and config.model.vocab_size is None:
            stated = re.search(r"with a vocabulary of ([\d,]+)", cell)
            if not stated:
                wrong.append(f"{preset}, {column}: {cell}: with what vocabulary?")
                continue
            model = config.model.model_copy(update={"vocab_size": int(stated[1].replace(",", ""))})
            config = config.model_copy(update={"model": model})
        exact = true(assume_vocabulary(config)) / scale
        written = re.match(rf"(\d+(?:\.(\d+))?) {unit}\b", cell)
        if not written or float(written[1]) != round(exact, len(written[2] or "")):
            wrong.append(f"{preset}, {column}: {cell}, not {exact:.4f}")
    assert wrong == []


def test_sampling_table_is_what_sampling_does() -> None:
    """The worked numbers of INFERENCE.md: five logits, the first token already in the text."""
    tables = tables_of(ROOT / "docs/INFERENCE.md")
    rows = next(rows for header, *rows in tables if header[0] == "settings")
    logits = next(row[1:] for row in rows if row[0] == "logits")
    scores = torch.tensor([[float(cell.replace("−", "-")) for cell in logits]])
    off: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    checked = 0
    for first, *cells in rows:
        if first == "logits":
            continue
        words = shlex.split(first.strip("`")) if first != "none" else []
        options = {
            flag.strip("-").replace("-", "_"): float(value) if "." in value else int(value)
            for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        sampling = Sampling(**(off | options))
        predicted = probabilities(penalize_repetition(scores, [[0]], sampling.repetition_penalty), sampling)
        expected = [round(100 * probability, 1) for probability in predicted[0].tolist()]
        assert [float(cell) for cell in cells] == expected, first
        checked += 1
    assert checked == 9
