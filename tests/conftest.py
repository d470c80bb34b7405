"""What several test files need: a tiny model, a corpus that is made here, quiet threads."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas.config import ModelConfig
from atlas.model import AtlasLM, build_model
from tests.browser import browser, page  # noqa: F401

# Without this limit, `training.precision: auto` would be bf16 on some machines and fp32 on others. Tests of bf16 choose
# it themselves.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"


@pytest.hookimpl(optionalhook=True)  # pytest runs without xdist, too
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Long tests measure memory and kill by the clock: one after the other. Others: one process a core."""
    return 0 if "slow" in config.option.markexpr.replace("not slow", "") else None


def pytest_collection_finish() -> None:
    """The garbage collector need not visit the million objects of imported modules and collected tests again and
    again, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A test file that cannot be imported without an extra says which extra."""
    report: Any = yield
    if report.failed and (remedy := _missing_extra(str(report.longrepr))):
        report.longrepr = f"{collector.nodeid}: {remedy}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """So does a test that imports it while it runs."""
    report: Any = yield
    error = call.excinfo.value if call.excinfo else None
    if report.failed and isinstance(error, ImportError) and (remedy := _missing_extra(str(error))):
        report.longrepr = f"{item.nodeid}: {remedy}"
    return report


def _missing_extra(error: str) -> str | None:
    """The command that installs the package whose import failed; None if no extra brings it."""
    missing = re.search(r"(?:No module named|import of) '?(\w+)", error)
    if not missing:
        return None
    try:
        requirements = importlib.metadata.requires("atlas-llm") or []
    except importlib.metadata.PackageNotFoundError:
        return "needs Atlas itself: pip install -e ."
    extras = set()
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"""extra == ["'](\w+)""", requirement)
        if name and extra and name[0].replace("-", "_").lower() == missing[1]:
            extras.add(extra[1])
    if not extras:
        return None
    smallest = min(extras, key=lambda extra: (extra == "dev", extra))
    return (
        f'needs the package {missing[1]}: pip install -e ".[{smallest}]"; all tests: pip install -e ".[dev]"'
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from a second thread, and lose much when the machine is busy. Children get one, too. Set
    before each test: a resumed run uses the thread count of its checkpoint."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of prepared texts."""
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(hidden_size=32, num_layers=2, num_heads=4, vocab_size=101, max_seq_len=24)


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> AtlasLM:
    """A model with sharp, varied logits, so that ties do not hide differences."""
    model = build_model(tiny_config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


SENTENCES = (
    "The river runs past the old mill and under the bridge.",
    "A small boat waits where the reeds are tall.",
    "In winter the water is dark, and nobody fishes there.",
    "When spring returns, the children throw stones from the bank.",
    "They count the rings until the surface is still again.",
)


def corpus(words: int = 4000) -> str:
    """Plain English that a small model can learn, the same every time."""
    text, number = [], 0
    while sum(map(len, text)) < words * 6:
        text.append(SENTENCES[number * 7 % len(SENTENCES)] + (f" Verse {number}." if number % 3 == 0 else ""))
        number += 1
    return "\n".join(text)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "river.txt"
    path.write_text(corpus(), encoding="utf-8")
    return path
