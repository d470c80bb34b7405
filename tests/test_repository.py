"""What holds for the repository as a whole: direction of imports, size of files, no code from data, the wheel."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from atlas.config.presets import preset_names

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "atlas").rglob("*.py"))

# What each folder may import from others. A folder's `__init__` re-exports what lies inside it.
ROOMS = {
    "tokenizer": "errors files config",
    "data": "errors files config tokenizer",
    "data.text.formats": "errors tokenizer",
    "data.text": "errors files progress data data.text.formats",
    "data.prepare": "errors files outputs process progress tokenizer data data.text data.text.formats",
    "data.sequences": "errors files progress config tokenizer data data.text data.text.formats data.prepare",
    "config": "errors files",
    "model": "errors config",
    "training.devices": "errors files machine process version config data.sequences model",
    "training.optimizers": "errors config model training.devices",
    "training.logs": "errors files streams machine config model training.devices",
    "training.memory": "errors machine process config model training.devices training.optimizers",
    "training.checkpoint": "errors files process config model tokenizer training.devices training.optimizers "
    "training.logs",
    "training": "errors files machine process config tokenizer data data.sequences model training.devices "
    "training.optimizers training.logs training.memory training.checkpoint",
    "planning": "errors machine config model training.devices training.optimizers training.memory",
    "inference": "errors progress config tokenizer model training.devices training.checkpoint",
    "export": "errors files outputs progress config tokenizer data data.sequences model training training.checkpoint "
    "inference",
    "reporting": "errors files outputs version config tokenizer data",
    "serving.api": "inference",
    "serving.backends": "errors tokenizer model inference export serving.api",
    "serving": "errors version tokenizer inference reporting serving.api serving.backends",
    "cli": "errors files outputs streams machine process progress version config tokenizer data data.text data.prepare "
    "data.sequences model planning training.devices training.logs training.memory training.checkpoint training "
    "inference export reporting serving serving.backends",
}
INSIDE = {
    "": "errors machine process progress version < files streams < outputs",
    "config": "fields renamed user_code < model < config < loader < presets reference",
    "tokenizer": "base < byte_level chat_template custom < bpe chat foreign gpt2 < load",
    "data": "shards",
    "data.text.formats": "code compression content encodings < chats decode < rows < sniff markup separators tables "
    "wikipedia < mediawiki",
    "data.text": "archives demo folders hashes report stdin < files < documents < selection < search < sources",
    "data.prepare": "checks cleaning dedup listing shard_writer staleness workspace < split < batching tokenize "
    "train_tokenizer < merge ray_engine < workers < pipeline",
    "data.sequences": "dataset loader verify < packing < conversations < mixture open < build",
    "model": "attention_cpu documents kv_cache recompute rope < mlp norm < attention < transformer < lora < cost",
    "planning": "advice cards communication doctor inference < speed < machine < run < scaling < tables",
    "training.devices": "compile gpu_temperature pinned signals world < parallel < device < memory "
    "network_check",
    "training.optimizers": "adafactor adamw adamw8bit bf16 < muon < build < memory",
    "training.memory": "estimate < parallel presets < fit",
    "training.logs": "rewind throughput trackers < run_log",
    "training": "loss_cuda output_folder schedule state < run_config < evaluate guard loss resume < run < recovery "
    "step summary < micro_batch < diagnostics launch train",
    "training.checkpoint": "first_version lock manifest safe_unpickle < atomic_write locate validate < "
    "base retention shard_format < load moves < convert manager verify < async_saver < shard_saver",
    "inference": "decoder layout sampling < generate < recall text < load < harness look < tasks",
    "export": "architectures gguf_header llama_cpp quantize save_imported < hf_format vocabulary < gguf "
    "import_first_version score < huggingface import_gguf import_hf verify < peft",
    "reporting": "curves dataset_statistics targets < dataset_figure runs < figure report",
    "serving.api": "errors fields shapes < body < formats < requests < items texts",
    "serving.backends": "drafts grammar prefixes < generation < llama sequence_state < engine",
    "serving": "files limits metrics runs server stream tools < answers dispatcher grammars prompts < "
    "openai pages responses texts < app",
    "cli": "choose_text doctor_facts old_flags options plan_report < terminal < choose_preset "
    "dataset_tables doctor evaluate export generate import_model info_checkpoint info_conversations look plan_output "
    "report serve train < demo info_dataset prepare < info plan < pipeline",
}
"""Of each folder, its files in order: each may import those before a `<` to its left. The table is also in
`docs/ARCHITECTURE.md`."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    """`data.text.files`; of a folder's `__init__`, the folder with a dot at the end."""
    name = ".".join(path.relative_to(ROOT / "atlas").with_suffix("").parts)
    return name.removesuffix("__init__") if name.endswith("__init__") else name


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


MODULES = {module_of(path) for path in SOURCES}


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of atlas) of every import, also of those inside functions and for type checkers alone."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "atlas" or name.startswith("atlas."):
                below = name[len("atlas.") :]
                places = (below, f"{below}.", room_of(below), f"{room_of(below)}." if "." in below else "")
                yield node.lineno, next(place for place in places if place in MODULES)


def test_imports_between_folders_point_one_way() -> None:
    found = []
    for path in SOURCES:
        module = module_of(path)
        room = room_of(module)
        for line, target in imported_modules(path):
            if not module:  # `atlas.load`
                allowed = target in ("version", "inference.")
            elif module.endswith("."):  # an `__init__` shows what its own folder has
                allowed = target.startswith(module) or target in ROOMS.get(module[:-1], "").split()
            elif not room:
                allowed = "." not in target or (module == "__main__" and target == "cli.")
            else:
                is_own_init = target.endswith(".") and f"{room}.".startswith(target)
                allowed = (room_of(target) or target) in [room, *ROOMS[room].split()] and not is_own_init
            if not allowed:
                found.append(f"{name_of(path)}:{line} imports atlas.{target.removesuffix('.')}")
    assert found == []


def test_no_folders_import_one_another() -> None:
    """The table of rooms is itself in order, so that no circle can pass through several folders."""
    assert list(TopologicalSorter({room: names.split() for room, names in ROOMS.items()}).static_order())


def test_imports_inside_folders_point_one_way() -> None:
    order = {
        f"{room}.{name}".removeprefix("."): level
        for room, names in INSIDE.items()
        for level, group in enumerate(names.split("<"))
        for name in group.split()
    }
    listed = {module for module in MODULES if module and not module.endswith(".")}
    assert set(order) == listed - {"__main__"}
    found = [
        f"{name_of(path)}:{line} imports atlas.{target}"
        for path in SOURCES
        for line, target in imported_modules(path)
        if (module := module_of(path)) in order and target in order and room_of(target) == room_of(module)
        if order[target] >= order[module]
    ]
    assert found == []


def test_the_pages_show_the_order_of_the_folders() -> None:
    page = " ".join((ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8").split())
    for room, names in INSIDE.items():
        assert f"| `{'atlas/' + room.replace('.', '/')}` | {names} |".replace("/`", "`") in page, room


def test_folders_have_at_most_18_files() -> None:
    """`cli` has one for each command."""
    sizes = Counter(path.parent for path in SOURCES if path.parent.name != "cli")
    assert {name_of(folder): size for folder, size in sizes.items() if size > 18} == {}


def declared_distributions() -> set[str]:
    """In normal form: what pyproject.toml asks for, the extras included."""
    lines = metadata.requires("atlas-llm") or []
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]


def normal(distribution: str) -> str:
    """https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_each_package_that_is_imported_is_one_we_ask_for() -> None:
    """What only some other package happens to bring is gone one day."""
    owners = metadata.packages_distributions()
    # Parts of what these give to their users; and aiohttp, which fsspec asks for where a URL is HTTP.
    brought = {
        "starlette": "fastapi",
        "pydantic_core": "pydantic",
        "fsspec": "torch",
        "aiohttp": "torch",
        "datasets": "lm-eval",
    }
    asked = declared_distributions()
    for path in SOURCES:
        for line, name in third_party(parsed(path)):
            names = {normal(owner) for owner in owners.get(name, [])} | {brought.get(name, name)}
            assert names & asked, f"{name_of(path)}:{line} imports {name}"


def third_party(tree: ast.AST) -> Iterator[tuple[int, str]]:
    ours = {
        "atlas",
        "compression",
        *sys.stdlib_module_names,
    }  # compression is the library's from Python 3.14 on
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        else:
            continue
        yield from ((node.lineno, name) for name in {module.split(".")[0] for module in modules} - ours)


def test_source_files_have_at_most_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_functions_have_at_most_60_lines() -> None:
    """Of body: a signature may take a line per option, a docstring what it needs."""
    long = []
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                if lines > 60:
                    long.append(f"{name_of(path)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_scripts_only_call_the_package() -> None:
    lengths = {
        p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "scripts").glob("*.py")
    }
    assert {"train.py", "infer.py", "prepare_data.py", "export_gguf.py"} <= set(lengths)
    assert {name: length for name, length in lengths.items() if length > 10} == {}


def test_no_code_comes_in_with_data() -> None:
    """`torch.load` of weights only, `np.load` without pickle, and of pickle nothing but its exception."""
    required = {("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False)}
    found = []
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            place = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                if (owner, node.func.attr) in required:
                    name, value = required[owner, node.func.attr]
                    given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                    if given.get(name) is not value:
                        found.append(f"{place} {owner}.{node.func.attr} without {name}={value}")
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                found += [f"{place} pickle.{node.attr}"] if node.attr != "UnpicklingError" else []
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                found += [f"{place} pickle.{a.name}" for a in node.names if a.name != "UnpicklingError"]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                found += [
                    f"{place} {m}"
                    for m in modules
                    if m in ("dill", "cloudpickle", "joblib", "marshal", "shelve")
                ]
    assert found == []


def test_no_file_names_the_machine_it_was_written_on() -> None:
    pattern = re.compile(r"(?:/home|/Users|/root|/work)/\w|[A-Z]:\\Users\\\w")
    folders = ("atlas", "benchmarks", "configs", "docs", "scripts", "tests", ".github", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    texts = [
        p
        for p in files
        if p.suffix in {".py", ".md", ".sh", ".ps1", ".yaml", ".yml", ".toml", ".txt", ".json", ""}
    ]
    found = [
        f"{name_of(path)}: {match.group()}"
        for path in texts
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


def test_both_test_scripts_take_the_same_steps() -> None:
    shell = (ROOT / "scripts/test.sh").read_text(encoding="utf-8")
    powershell = (ROOT / "scripts/test.ps1").read_text(encoding="utf-8")
    steps = re.findall(r'^run (.*?)(?: "\$@")?$', shell, re.M)
    assert steps == ["ruff check .", "ruff format --check .", "mypy", "pytest"]
    assert re.findall(r"^\s*Invoke-Checked \$python -m (.*?)(?: @options)?$", powershell, re.M) == steps


@pytest.mark.skipif(os.name == "nt", reason="runs the Bash script")
def test_test_script_says_what_it_needs_where_no_python_is_new_enough(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("test.sh", "venv.sh"):
        (tmp_path / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    only = tmp_path / "bin"
    only.mkdir()
    for tool in ("bash", "dirname", "cat", "cmp", "rm"):
        found = next(Path(p, tool) for p in os.environ["PATH"].split(os.pathsep) if Path(p, tool).exists())
        (only / tool).symlink_to(found)
    (only / "python3").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (only / "python3").chmod(0o755)
    done = subprocess.run(
        [only / "bash", tmp_path / "scripts/test.sh"],
        cwd="/",
        env={"PATH": str(only)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "error: no Python 3.10 or newer on PATH" in done.stderr
    assert not (tmp_path / ".venv").exists()


WITHOUT = """
import sys, pytest
sys.modules[sys.argv[1]] = None
sys.exit(pytest.main(sys.argv[2:]))
"""


def run_pytest(*arguments: str, without: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, as where the package `without` is not installed."""
    command = [sys.executable, "-c", WITHOUT, without, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_one_test_runs_by_its_name_after_the_faqs_installation() -> None:
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for package in ("pytest", "pytest-xdist", "hypothesis"):
        assert re.search(rf"^{package}>=", requirements, re.M)
    names = re.findall(r"`pytest (tests/\S+::\S+) -v`", (ROOT / "docs/FAQ.md").read_text(encoding="utf-8"))
    assert names
    done = run_pytest(*names, "-v", "-p", "no:xdist", without="transformers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_test_that_needs_an_extra_says_which() -> None:
    files = (
        "tests/export/test_huggingface.py",
        "tests/test_model.py",
    )  # which import it as a whole, and in a test
    options = ("-q", "-k", "transformers_gpt2", "--continue-on-collection-errors")
    done = run_pytest(*files, *options, without="transformers")
    assert done.returncode != 0
    for name in (
        "tests/export/test_huggingface.py: ",
        "test_logits_and_all_gradients_equal_transformers_gpt2[tied]: ",
    ):
        assert f'{name}needs the package transformers: pip install -e ".[hf]"' in done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git")
def test_a_clone_has_the_folders_that_the_faq_puts_data_in() -> None:
    for name in ("data/raw", "data/processed"):
        tracked = subprocess.run(
            ["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.split()
        assert tracked == [f"{name}/README"]
        ignored = ["git", "check-ignore", "-q", f"{name}/archive.zip"]
        assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_wheel_works_outside_the_tree(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("atlas_llm-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "atlas/py.typed" in names
    static = ("charts.js", "report.css", "report.html", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
    assert {f"atlas/reporting/static/{name}" for name in static} <= set(names)
    pages = ("index.html", "runs.html", "page.css", "page.js", "common.js", "views.js", "runs.js")
    assert {f"atlas/serving/page/{name}" for name in pages} <= set(names)
    assert sum(name.endswith(("/LICENSE", "/NOTICE")) for name in names) == 3  # uPlot's among them
    assert not [name for name in names if name.startswith(("tests/", "configs/", "docs/"))]

    outside = tmp_path / "outside"
    outside.mkdir()

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=outside,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert run("-c", "import atlas; print(atlas.__file__)").startswith(str(site))
    assert run("-m", "atlas", "--version").startswith("atlas ")
    assert run(
        "-c", "from atlas.tokenizer import Tokenizer; print(Tokenizer.gpt2().encode('Hello world'))"
    ) == ("[15496, 995]")
    listing = run(
        "-c",
        "from atlas.config.loader import read_yaml, resolve\n"
        "from atlas.config.presets import find_config, preset_names\n"
        "for name in preset_names():\n"
        "    print(name, resolve(read_yaml(find_config(name))).model.num_layers, find_config(name))",
    )
    assert [line.split()[0] for line in listing.splitlines()] == list(preset_names())
    assert all(str(site) in line for line in listing.splitlines())
