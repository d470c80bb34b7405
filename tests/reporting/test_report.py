"""`atlas report`: what a user sees in the page, opened from the disk in a browser without a network."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import yaml

from atlas.cli import main
from atlas.errors import AtlasError
from atlas.reporting.curves import MOST_POINTS, thin
from atlas.reporting.report import differences
from atlas.reporting.runs import Run, chart_data, read_runs, samples_by_prompt
from tests.runs import REPOSITORY, layer, trained

if TYPE_CHECKING:
    from playwright.sync_api import Page

ATTACK = "</script><img src=x onerror=alert(1)>"
NEW = {"tokens": 4096, "seconds": 2.5, "utilisation": 0.004, "memory": 1 << 20}
"""Values that a record of today has, for one step."""


def train_record(step: int, *, rate: float = 0.01, new: bool = True) -> dict[str, Any]:
    record = {
        "kind": "train",
        "step": step,
        "loss": 3 + 6 * math.exp(-rate * step) + 0.1 * math.sin(step * 12.9898),
        "learning_rate": 1e-3,
        "grad_norm": 0.5 + 1 / step,
        "tokens_per_second": 50_000 + 10 * step,
        "data_wait": 0.01,
        "sequences_consumed": 8 * step,
    }
    return record | ({name: worth * step for name, worth in NEW.items()} if new else {})


def write_run(folder: Path, records: list[dict[str, Any]], *, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def a_run(folder: Path, *, steps: int = 100, rate: float = 0.01, hidden_size: int = 64) -> Path:
    records = [train_record(step, rate=rate) for step in range(1, steps + 1)]
    for step in range(20, steps + 1, 20):
        loss = records[step - 1]["loss"] + 0.2
        validation = {"val_loss": loss, "val_perplexity": math.exp(loss), "bits_per_byte": loss / 3}
        records.append({"kind": "validation", "step": step, **validation})
        records.append({"kind": "sample", "step": step, "prompt": "The river", "text": f" ran {step}"})
    start = {"event": "start", "device": "cpu", "versions": {"torch": "2.10.0"}, "parameters": 123456}
    records.insert(0, {"kind": "event", "step": 0, **start})
    config = {
        "model": {"hidden_size": hidden_size, "max_seq_len": 512},
        "training": {"max_steps": steps, "batch_size": 8},
    }
    return write_run(folder, records, config=config)


def report(tmp_path: Path, *arguments: object) -> str:
    """The page's address."""
    output = tmp_path / "report.html"
    assert main(["report", *map(str, arguments), "--output", str(output)]) == 0
    return output.as_uri()


def painted(page: Page, chart: str) -> int:
    """Pixels of a chart's canvas that are not empty."""
    script = """canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((value, place) => place % 4 === 3 && value > 0).length;
    }"""
    return int(page.locator(f'[data-chart="{chart}"] canvas').evaluate(script))


def legend(page: Page, name: str) -> list[str]:
    return page.locator(f'.legend tr[data-run="{name}"] td').all_inner_texts()


# In the browser


def test_two_runs_are_laid_over_each_other(tmp_path: Path, page: Page) -> None:
    page.goto(report(tmp_path, a_run(tmp_path / "slow"), a_run(tmp_path / "fast", rate=0.05, hidden_size=96)))
    assert page.locator(".legend .run-name").all_inner_texts() == ["slow", "fast"]
    assert painted(page, "loss") > 3000
    shown = page.locator("[data-chart]").evaluate_all("all => all.map(one => one.dataset.chart)")
    assert shown == [
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "utilisation",
        "memory",
        "data_wait",
    ]
    differing = page.locator("section", has_text="Differences of the configs").inner_text()
    assert "model.hidden_size" in differing
    assert "96" in differing
    assert "training.batch_size" not in differing
    assert "torch" in page.locator("section", has_text="Machine and versions").inner_text()


def test_hover_shows_the_values_there(tmp_path: Path, page: Page) -> None:
    page.goto(report(tmp_path, a_run(tmp_path / "slow"), a_run(tmp_path / "fast", rate=0.05)))
    over = page.locator('[data-chart="loss"] .u-over').bounding_box()
    assert over
    middle = 1 + 99 * 0.5  # steps 1 to 100 fill the width
    page.mouse.move(over["x"] + over["width"] * (50 - 1) / 99, over["y"] + 60)
    assert 49 <= middle <= 51
    for name, rate in (("slow", 0.01), ("fast", 0.05)):
        raw, shown = legend(page, name)[1], legend(page, name)[3]
        step = int(shown.removeprefix("step "))
        assert abs(step - 50) <= 1
        assert float(raw) == pytest.approx(train_record(step, rate=rate)["loss"], abs=1e-4)
    page.mouse.move(5, 5)
    assert legend(page, "slow")[3] == "step 100"


def test_axis_switch_and_zoom(tmp_path: Path, page: Page) -> None:
    old = write_run(tmp_path / "old", [train_record(step, new=False) for step in range(1, 51)], config={})
    page.goto(report(tmp_path, a_run(tmp_path / "new"), old))
    page.get_by_role("button", name="Time", exact=True).click()
    assert page.url.endswith("#time")
    assert "old is not shown over time: not all of its records contain seconds" in page.inner_text("#charts")
    assert legend(page, "new")[3] == "4 min 10 s"  # 100 steps of 2.5 s
    assert legend(page, "old") == ["–", "–", "–", ""]
    page.reload()
    assert legend(page, "new")[3] == "4 min 10 s"  # like a live page that reloads itself
    page.get_by_role("button", name="Tokens", exact=True).click()
    assert legend(page, "new")[3] == "410k tokens"
    page.get_by_role("button", name="Log", exact=True).click()
    assert painted(page, "loss") > 3000

    over = page.locator('[data-chart="loss"] .u-over').bounding_box()
    assert over
    left, top = over["x"], over["y"] + 80
    page.mouse.move(left + 0.25 * over["width"], top)
    page.mouse.down()
    page.mouse.move(left + 0.5 * over["width"], top, steps=4)
    page.mouse.up()
    page.mouse.move(left + 1, top)
    tokens = float(legend(page, "new")[3].removesuffix("k tokens"))
    assert tokens == pytest.approx(0.25 * 409.6, rel=0.05)
    page.mouse.dblclick(left + 5, top)
    page.mouse.move(left + 1, top)
    assert float(legend(page, "new")[3].removesuffix("k tokens")) < 10


def test_keys_read_and_zoom_and_a_run_can_be_hidden(tmp_path: Path, page: Page) -> None:
    page.goto(report(tmp_path, a_run(tmp_path / "one"), a_run(tmp_path / "two")))
    page.locator(".charts").focus()
    page.keyboard.press("Home")
    assert legend(page, "one")[3] == "step 1"
    page.keyboard.press("End")
    assert legend(page, "one")[3] == "step 100"
    page.keyboard.press("+")
    page.keyboard.press("Home")
    assert int(legend(page, "one")[3].removeprefix("step ")) > 20
    page.locator(".run-name", has_text="two").press("Enter")
    assert legend(page, "two")[0] == "–"


def test_new_data_go_into_the_charts_that_are_there(tmp_path: Path, page: Page) -> None:
    """As a served page does."""
    folder = a_run(tmp_path / "one", steps=60)
    page.goto(report(tmp_path, folder))
    longer = chart_data(Run(a_run(tmp_path / "more" / "one", steps=90)))
    page.evaluate(
        """([before, after]) => {
            const container = document.getElementById("charts");
            window.charts = AtlasCharts.create(container, { runs: [before] });
            container.querySelector("canvas").id = "first";
            window.charts.update({ runs: [after] });
        }""",
        [chart_data(Run(folder)), longer],
    )
    assert legend(page, "one")[3] == "step 90"
    assert page.locator("canvas#first").count() == 1
    page.evaluate("charts.destroy()")
    assert page.locator("#charts *").count() == 0


def test_text_from_a_stranger_stays_text(tmp_path: Path, page: Page) -> None:
    records = [train_record(step) for step in range(1, 20)]
    records += [
        {"kind": "sample", "step": 19, "prompt": ATTACK, "text": ATTACK * 2},
        {"kind": "event", "step": 19, "event": "rollback", "from_step": ATTACK, "reason": ATTACK},
        {"kind": "event", "step": 1, "event": "start", ATTACK: ATTACK},
    ]
    # The name of a folder cannot contain a slash.
    folder = write_run(tmp_path / ATTACK.replace("/", ""), records, config={"data": {"train_data": ATTACK}})
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(report(tmp_path, folder, a_run(tmp_path / "other")))
    page.locator(".charts").focus()
    page.keyboard.press("End")
    page.wait_for_timeout(100)
    assert dialogs == []
    assert page.locator("img").count() == 0
    assert page.locator("dd", has_text="onerror").first.inner_text().count("onerror") == 2


# Runs of every kind


def test_a_real_run(tmp_path: Path, text_file: Path, page: Page) -> None:
    folder = tmp_path / "real"
    trained(layer(folder, text_file, data__val_data=str(text_file), training__eval_interval=3))
    page.goto(report(tmp_path, folder))
    assert page.locator(".state").inner_text() == "finished"
    assert legend(page, "real")[3] == "step 6"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if line["kind"] == "validation"][-1]
    assert f"{last['bits_per_byte']:.4f}" in page.locator("section").first.inner_text()


@pytest.mark.parametrize("kind", ["without validation", "interrupted", "rolled back", "old", "half a line"])
def test_every_kind_of_run_gives_a_report(tmp_path: Path, page: Page, kind: str) -> None:
    records = [train_record(step, new=kind != "old") for step in range(1, 41)]
    records[4]["loss"] = None
    said = {"without validation": "was not evaluated", "interrupted": "interrupted", "old": "older Atlas"}
    if kind == "interrupted":
        records.append({"kind": "event", "event": "interrupt", "step": 40})
    if kind == "rolled back":
        event = {"event": "rollback", "step": 20, "from_step": 40, "reason": "the loss is not finite"}
        records.append({"kind": "event", **event})
        records += [train_record(step) for step in range(21, 31)]
    folder = write_run(tmp_path / "run", records)
    if kind == "half a line":
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"kind": "train", "step": 41, "lo')
    page.goto(report(tmp_path, folder / "metrics.jsonl"))
    assert said.get(kind, "") in page.inner_text("main")
    assert painted(page, "loss") > 1000
    assert legend(page, "run")[3] == ("step 30" if kind == "rolled back" else "step 40")
    if kind == "rolled back":
        assert "rollback: from step 40; the loss is not finite" in page.inner_text("main")


def test_a_run_before_its_first_record(tmp_path: Path, page: Page) -> None:
    page.goto(report(tmp_path, write_run(tmp_path / "young", [])))
    assert page.locator(".state").inner_text() == "ended early"


# Without a browser


def test_tokens_of_an_old_run_follow_from_its_sequences(tmp_path: Path) -> None:
    records = [train_record(step, new=False) for step in (1, 2, 3)]
    known = write_run(tmp_path / "known", records, config={"model": {"max_seq_len": 512}})
    assert chart_data(Run(known))["series"]["loss"]["tokens"] == [8 * 512, 16 * 512, 24 * 512]
    bare = chart_data(Run(write_run(tmp_path / "bare", records)))
    assert bare["axes"] == ["step"]
    assert set(bare["axes_missing"]) == {"tokens", "time"}


def test_the_best_evaluation_need_not_be_the_last(tmp_path: Path) -> None:
    records = [{"kind": "validation", "step": step, "val_loss": abs(step - 3) + 1} for step in range(1, 6)]
    evaluations = Run(write_run(tmp_path / "run", records)).evaluations()
    assert evaluations
    assert [found["step"] for found in evaluations] == [5, 3]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '{"kind": ["train"], "step": 1}', '{"kind": "train", "step": NaN}', '{"step": 1}'],
)
def test_a_line_that_is_no_record_is_counted_and_left_out(line: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(1)])
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    run = Run(folder)
    assert (run.last_step, run.unreadable) == (1, 1)


def test_refresh_reads_added_lines_and_truncated_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(1)])
    live = Run(folder)
    path, line = folder / "metrics.jsonl", json.dumps(train_record(2)) + "\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(line[:10])
        file.flush()
        live.refresh()
        assert live.last_step == 1
        file.write(line[10:])
    live.refresh()
    assert (live.last_step, live.unreadable) == (2, 0)
    other = tmp_path / "other"
    other.write_text(json.dumps(train_record(7)) + "\n", encoding="utf-8")
    os.replace(other, path)  # as RunLog.rewind does
    live.refresh()
    assert chart_data(live)["series"]["loss"]["step"] == [7]


def test_thinning_keeps_the_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_001)
    values[77_777], values[12_345] = 50, -50
    kept = thin(values)
    assert kept.size <= MOST_POINTS
    assert {0, 100_000, 77_777, 12_345} <= set(kept.tolist())
    assert all(one < other for one, other in itertools.pairwise(kept.tolist()))


def test_differences_are_those_of_the_settings(tmp_path: Path) -> None:
    runs = read_runs([a_run(tmp_path / "a"), a_run(tmp_path / "b", steps=40)])
    assert differences(runs) == [("training.max_steps", ["100", "40"])]


def test_many_samples_are_spread_over_the_run(tmp_path: Path) -> None:
    records = [{"kind": "sample", "step": n, "prompt": "p", "text": str(n)} for n in range(1, 101)]
    (texts,) = samples_by_prompt(Run(write_run(tmp_path / "run", records))).values()
    assert (len(texts), texts[0], texts[-1]) == (12, (1, "1"), (100, "100"))


def test_runs_of_one_name_get_different_names(tmp_path: Path) -> None:
    runs = read_runs([a_run(tmp_path / "a/nano", steps=20), a_run(tmp_path / "b/nano", steps=20)])
    assert [one.name for one in runs] == ["a/nano", "b/nano"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such file"),
        (lambda folder: (folder / "metrics.jsonl").mkdir(), "cannot be read"),
    ],
)
def test_a_path_without_a_run_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(AtlasError, match=rf"metrics\.jsonl: .*{message}.*name"):
        Run(tmp_path)


def test_png_is_a_png(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    report(tmp_path, a_run(tmp_path / "one"), a_run(tmp_path / "two"), "--png", figure)
    head = figure.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (2100, 1260)


@pytest.mark.parametrize("flags", [("--output", "x.txt"), ("--output", "no/x.html"), ("--png", "x.svg")])
def test_bad_names_are_refused(
    tmp_path: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(a_run(tmp_path / "run", steps=5)), *flags]) == 2
    assert f"error: {' '.join(flags)}" in capsys.readouterr().err


def test_live_rewrites_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = a_run(tmp_path / "run", steps=20), tmp_path / "report.html"
    config = {"training": {"max_steps": 21}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    owner = {"process": os.getpid(), "host": platform.node()}
    (folder / "atlas.lock").write_text(json.dumps(owner), encoding="utf-8")
    seen = []

    def next_step(seconds: float) -> None:
        seen.append(output.read_text(encoding="utf-8"))
        assert len(seen) == 1, "the run has ended, and the report is still written"
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(train_record(21)) + "\n")

    monkeypatch.setattr(time, "sleep", next_step)
    report(tmp_path, folder, "--live")
    assert 'http-equiv="refresh" content="5"' in seen[0]
    assert '"last_step": 20' in seen[0]
    last = output.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in last
    assert '"last_step": 21' in last


def test_a_lock_of_an_ended_process_means_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(1)])
    lock = folder / "atlas.lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not psutil.pid_exists(gone.pid)
    lock.write_text(json.dumps({"process": gone.pid, "host": platform.node()}), encoding="utf-8")
    assert Run(folder).state == "stopped"
    lock.write_text(json.dumps({"process": gone.pid, "host": "elsewhere"}), encoding="utf-8")
    assert Run(folder).state == "unknown"
    lock.write_text(json.dumps({"process": os.getpid(), "host": platform.node()}), encoding="utf-8")
    assert Run(folder).state == "running"
    os.utime(lock, (0, 0))  # of a process that had this number long ago
    assert Run(folder).state == "stopped"


def test_it_starts_without_torch(tmp_path: Path) -> None:
    folder, output = a_run(tmp_path / "run", steps=5), tmp_path / "report.html"
    code = (
        "import sys; from atlas.cli import main; "
        f"assert main(['report', {str(folder)!r}, '--output', {str(output)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert output.exists()
