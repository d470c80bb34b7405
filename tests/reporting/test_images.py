"""The images in docs/images: rebuilt from a real run, with their sizes.

    ATLAS_REMAKE_IMAGES=1 pytest -m slow tests/reporting/test_images.py

puts them into docs/images. Without the variable they go to a temporary folder, which only tests that they can be built.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from atlas.data import prepare
from atlas.data.text.demo import write_demo_corpus
from tests.cli.test_serve_command import serving
from tests.project import ROOT
from tests.runs import start_process

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = ROOT / "docs/images"
PROMPT = "Return the name of the file"


def size_of(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


@pytest.mark.slow
def test_images_of_the_page_are_rebuilt(tmp_path: Path, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the images show no folder of this machine
    page.set_viewport_size({"width": 1280, "height": 760})
    target = IMAGES if os.environ.get("ATLAS_REMAKE_IMAGES") else tmp_path / "images"
    target.mkdir(exist_ok=True)
    write_demo_corpus(tmp_path / "demo.jsonl")
    data = prepare([tmp_path / "demo.jsonl"], tmp_path / "data", train_tokenizer=2048)
    runs = Path("checkpoints")
    settings = ["training.max_steps=400", "training.eval_interval=100", "training.log_interval=10"]
    settings += ["checkpoint.save_interval=100", "checkpoint.keep_checkpoints=20"]
    options = [word for setting in settings for word in ("--set", setting)]
    data_options = ["--train-data", str(data.dataset.folder), "--output-dir", str(runs / "modern-nano")]
    training = start_process(ROOT / "configs/modern-nano.yaml", *data_options, *options)
    first, best = runs / "modern-nano/atlas_step_100.pt", runs / "modern-nano/atlas_best.pt"
    try:
        while training.poll() is None and not (first.with_suffix(".json").exists() and best.exists()):
            pass
        models = ["--checkpoint", str(first), "--checkpoint", str(best)]
        with serving(*models, "--runs", str(runs)) as (_, address):
            page.goto(f"{address}/runs")
            page.locator("#charts canvas").nth(0).wait_for()
            step = page.locator("#charts").get_by_text(re.compile(r"^step [\d,]+$")).first
            before = step.text_content()
            while training.poll() is None:
                page.wait_for_timeout(500)
            page.wait_for_timeout(3000)
            assert step.text_content() != before  # it grew
            page.screenshot(path=target / "page_runs.png")
            page.goto("about:blank")  # it would otherwise send requests to a server that has ended
        with serving(*models) as (_, address):
            _walk(page, address, target)
    finally:
        training.kill()
        training.communicate()
    for name in ("alternatives", "sampling", "attention", "layers", "beside", "runs"):
        made, kept = target / f"page_{name}.png", IMAGES / f"page_{name}.png"
        assert size_of(made) == size_of(kept)
        assert made.stat().st_size > 20_000  # an empty page is smaller


def _walk(page: Page, address: str, target: Path) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    page.select_option("#model", "atlas_best")
    page.fill("#prompt", PROMPT)
    page.fill("#settings [name=seed]", "4")
    page.click("#write")
    page.locator("#columns[aria-busy=false]").wait_for()
    for name, index in (("alternatives", 20), ("sampling", 20), ("attention", 36), ("layers", 36)):
        page.click(f"#tab-{name}")
        tokens = page.locator(".token")
        tokens.nth(
            min(index, tokens.count() - 1)
        ).click()  # processors differ in the text, which may end earlier
        page.wait_for_timeout(600)
        page.screenshot(path=target / f"page_{name}.png")
    page.select_option("#model", "atlas_step_100")
    page.select_option("#beside", "atlas_best")
    page.click("#write")
    page.locator("#columns[aria-busy=false]").wait_for()
    page.screenshot(path=target / "page_beside.png")
