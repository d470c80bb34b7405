"""The served page in a real browser: every step that a person takes, and the server's responses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import cross_entropy

from atlas.inference.load import LoadedModel
from atlas.inference.look import attention
from atlas.serving.backends.engine import Engine
from atlas.serving.dispatcher import ServerSettings
from tests.served import random_model, served
from tests.serving.test_serving import post


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model()


@pytest.fixture(scope="module")
def address(loaded: LoadedModel) -> Iterator[str]:
    engines = [Engine(loaded, "first", parallel=4, queue=8)]
    engines.append(Engine(random_model(seed=1), "second", parallel=4, queue=8))
    with served(engines) as address:
        yield address


if TYPE_CHECKING:
    from playwright.sync_api import Page

PIXELS = """canvas => {
    const size = canvas.width, data = canvas.getContext("2d").getImageData(0, 0, size, size).data;
    const rows = Array.from({ length: size }, (_, row) => row);
    return rows.map((row) => rows.map((column) => data[4 * (row * size + column) + 3] > 0));
}"""
"""The drawn pixels of a square canvas."""


VIEWS = {"alternatives": "#alternatives", "sampling": "#sampling", "attention": "#head", "layers": "#lens"}


def texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def one_sign_for_no_character(text: str) -> str:
    return re.sub(r"(\\x[0-9a-f]{2}|[\x00-\x08\x0b-\x1f\x7f\ufffd])+", "\ufffd", text)


def write(page, prompt: str, **settings: object) -> None:
    page.fill("#prompt", prompt)
    for name, value in settings.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.click("#write")
    page.locator("#columns[aria-busy=false]").wait_for()


def test_person_writes_looks_and_branches(address: str, loaded: LoadedModel, page: Page) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    write(page, "The river", seed=3, max_tokens=30)
    expected = post(
        address,
        {
            "model": "first",
            "prompt": "The river",
            "max_tokens": 30,
            "seed": 3,
            "temperature": 0.8,
            "top_p": 0.95,
            "top_k": 50,
        },
    )[1]["choices"][0]["text"]
    written = "".join(texts(page, ".token")).replace("↵", "").replace("·", "")
    # The page shows bytes of incomplete characters as escapes; the text may end inside a character.
    assert one_sign_for_no_character("The river" + expected).startswith(one_sign_for_no_character(written))
    assert len(written) > 20
    given = page.locator(".token.prompt").count()
    assert given == len(loaded.tokenizer.encode("The river"))

    # Alternatives are the model's, and a click continues from one of them.
    place = page.locator(".token").nth(given + 4)
    place.click()
    buttons = page.locator("#alternatives button")
    assert buttons.count() == 10
    offered = [buttons.nth(number).text_content() or "" for number in range(10)]
    other = next(
        number for number, text in enumerate(offered) if text != place.text_content() and "\\x" not in text
    )
    said, before = buttons.nth(other).text_content(), texts(page, ".token")[: given + 4]
    buttons.nth(other).click()
    page.locator("#columns[aria-busy=false]").wait_for()
    page.locator(".token").nth(given + 6).wait_for()
    assert texts(page, ".token")[: given + 5] == [*before, said]
    assert page.locator(".token.prompt").count() == given
    assert page.locator(".token[aria-pressed=true]").get_attribute("data-index") == str(given + 4)
    assert page.evaluate("document.activeElement.dataset.index") == str(given + 4)


def test_distribution_follows_the_temperature(address: str, page: Page) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    write(page, "The river", seed=3, max_tokens=12, top_k=5)
    page.locator(".token").nth(8).click()
    page.click("#tab-sampling")
    page.locator("#sampling").wait_for()
    cells = page.locator("#sampling td:nth-child(3)")
    warm = cells.all_text_contents()
    assert warm[5:].count("top-k") == len(warm) - 5
    widths = page.locator("#sampling td i:not(.before)")
    first = widths.nth(1).evaluate("bar => bar.getBoundingClientRect().width")
    page.fill("#settings [name=temperature]", "0")
    page.locator("#sampling tr:nth-child(2) td:nth-child(3)", has_text="temperature").wait_for()
    assert cells.all_text_contents() == ["100 %"] + ["temperature"] * (len(warm) - 1)
    page.fill("#settings [name=temperature]", "2")
    page.locator("#sampling tr:nth-child(2) td:nth-child(3)", has_text="%").wait_for()
    assert cells.all_text_contents() != warm
    assert widths.nth(1).evaluate("bar => bar.getBoundingClientRect().width") != first


def test_attention_and_layers_are_drawn_from_the_model(address: str, loaded: LoadedModel, page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    write(page, "The river runs", seed=3, max_tokens=10)
    page.locator(".token").nth(9).focus()
    page.keyboard.press("Enter")  # no mouse
    page.locator("#tab-alternatives").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.locator(".heads button").nth(3).wait_for()
    assert page.locator(".heads button").count() == loaded.config.model.num_heads
    drawn = page.locator("#head").evaluate(PIXELS)
    assert [any(row) for row in drawn] == [True] * 10
    assert not any(any(row[number + 1 :]) for number, row in enumerate(drawn))  # nothing that comes later
    page.select_option("#layer", "1")
    page.locator(".heads button").nth(2).click()
    page.locator("h2", has_text="head 2").wait_for()
    assert page.locator(".token.attended").count() == 10
    # The tokens are at both sides of the picture, and the pointer reads the model's weights.
    ids = loaded.tokenizer.encode("The river runs")
    labels = [loaded.tokenizer.decode([id]) for id in ids]
    for side in ("left", "top"):
        told = texts(page, f".labelled .{side} span")
        assert (told[: len(ids)], len(told)) == (labels, 10)
    page.locator("#head").hover(position=cell_of(page, row=2, column=1))
    weight = attention(loaded, ids, layers=[1])[0, 2, 2, 1]
    assert (page.text_content("#weight") or "").startswith(f"{labels[2]} → {labels[1]}: ")
    assert_percent((page.text_content("#weight") or "").partition(": ")[2], float(weight))
    page.locator("#head").hover(position=cell_of(page, row=2, column=7))
    assert "later" in (page.text_content("#weight") or "")
    page.locator("#tab-attention").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#lens").wait_for()
    assert texts(page, "#lens th") == ["embedding", "layer 0", "layer 1"]
    # The last layer's row has the probabilities of the model itself.
    page.locator("#tab-layers").click()
    shares = texts(page, "#lens tr:last-child small")
    page.locator("#tab-alternatives").click()
    page.locator("#alternatives").wait_for()
    assert shares == texts(page, "#alternatives td:nth-child(2)")[:6]


def read(address: str, model: str, text: str) -> dict:
    status, answer = post(address, {"model": model, "prompt": text}, "/api/read")
    assert status == 200
    return answer


def cell_of(page, *, row: int, column: int) -> dict[str, float]:
    """The middle of a square of the attention picture, in pixels of the page."""
    box = page.locator("#head").bounding_box()
    size = page.locator("#head").evaluate("canvas => canvas.width")
    return {"x": (column + 0.5) * box["width"] / size, "y": (row + 0.5) * box["height"] / size}


def assert_percent(shown: str, fraction: float) -> None:
    assert float(shown.removesuffix(" %").removeprefix("< ")) == pytest.approx(100 * fraction, abs=0.5)


def loss_of_one_pass(loaded: LoadedModel, ids: list[int]) -> float:
    """The mean loss of a text that fits into the context, from the logits of one forward pass."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        return float(cross_entropy(loaded.model(tokens)[0, :-1], tokens[0, 1:]))


def test_a_pasted_text_is_measured_in_both_models(address: str, loaded: LoadedModel, page: Page) -> None:
    text = "The river runs past the mill — größer."
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    page.select_option("#beside", "second")
    page.fill("#prompt", text)
    page.click("#measure")
    page.locator("#columns[aria-busy=false]").wait_for()
    ids = loaded.tokenizer.encode(text)
    losses = [loss_of_one_pass(each, ids) for each in (loaded, random_model(seed=1))]
    num_bytes = len(b"".join(map(loaded.tokenizer.token_bytes, ids[1:])))
    for said, loss in zip(texts(page, "#columns p"), losses, strict=True):
        bits = loss * (len(ids) - 1) / math.log(2) / num_bytes
        told = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,.]*", said)[:3]]
        assert told == pytest.approx([loss, math.exp(loss), bits], rel=1e-3)
        assert f"{len(ids)} tokens" in said
    assert page.locator("#columns > :first-child .token.prompt").count() == len(ids)
    # The text can be continued from one of its tokens.
    page.locator("#columns > :first-child .token").nth(4).click()
    page.locator("#alternatives button").nth(1).click()
    page.locator("#columns > :first-child .token:not(.prompt)").nth(3).wait_for()
    assert page.locator("#columns > :first-child p").is_hidden()


def test_a_long_text_is_measured_in_windows(address: str, loaded: LoadedModel) -> None:
    """Each token after the first window is predicted from at least half a context."""
    answer = read(address, "first", "The river runs past the mill. " * 30)
    ids = [token["id"] for token in answer["tokens"]]
    context, known = 64, 32
    assert len(ids) > 3 * context
    expected = []
    for place in range(1, len(ids)):
        block = max(0, (place - known) // (context - known))
        window = torch.tensor([ids[block * (context - known) : place]])
        with torch.inference_mode():
            expected.append(float(loaded.model(window)[0, -1].log_softmax(-1)[ids[place]]))
    assert [token["log_probability"] for token in answer["tokens"][1:]] == pytest.approx(expected, abs=1e-3)
    assert answer["measured"]["loss"] == pytest.approx(-sum(expected) / len(expected), rel=1e-4)
    assert answer["measured"]["tokens"] == len(ids) - 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_leaves_a_phones_screen(address: str, page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    page.select_option("#beside", "second")
    write(page, "The river runs", seed=3, max_tokens=20)
    page.locator(".token").nth(6).click()
    for view, drawn in VIEWS.items():
        page.click(f"#tab-{view}")
        page.locator(drawn).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360, view
        assert page.locator("aside").evaluate("aside => aside.scrollWidth <= aside.clientWidth"), view


def test_alternatives_have_the_models_probabilities(address: str, loaded: LoadedModel, page: Page) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    write(page, "The river", seed=3, max_tokens=5)
    page.locator("#alternatives").wait_for()
    shown = texts(page, "#alternatives td:nth-child(2)")
    ids = loaded.tokenizer.encode("The river")
    _, answer = post(
        address,
        {
            "prompt": ids,
            "max_tokens": 6,
            "seed": 3,
            "logprobs": 10,
            "temperature": 0.8,
            "top_k": 50,
            "top_p": 0.95,
        },
    )
    likeliest = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][5].values(), reverse=True)[:10]
    assert [float(text.removesuffix(" %").removeprefix("< ")) for text in shown] == pytest.approx(
        [100 * math.exp(logprob) for logprob in likeliest], abs=0.5
    )


def test_views_of_a_text_longer_than_the_context_use_the_models_window(address: str, page: Page) -> None:
    """The window slides; each view shows the window from which the token was generated."""
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    write(page, "The river", seed=3, max_tokens=110)
    place = page.locator(".token").nth(105)
    place.click()
    said = texts(page, "#alternatives tr:first-child td:nth-child(2)")
    page.click("#tab-sampling")
    page.locator("#sampling").wait_for()
    assert texts(page, "#sampling tbody tr:first-child td:nth-child(2)") == said
    page.click("#tab-attention")
    page.locator("#head").wait_for()
    attended = page.locator(".token.attended").evaluate_all(
        "spans => spans.map(span => Number(span.dataset.index))"
    )
    assert attended == list(range(66, 106))  # it slid at 65 tokens to 33, and at 98 to 66
    # A branch continues from there, although the full text exceeds the context.
    page.click("#tab-alternatives")
    before = texts(page, ".token")[:105]
    page.locator("#alternatives button").nth(2).click()
    page.locator(".token").nth(150).wait_for(state="attached")
    assert texts(page, ".token")[:105] == before


def test_a_late_response_does_not_replace_the_view_of_a_token(address: str, page: Page) -> None:
    """After the last token the page asks what could follow. A token is chosen before the response comes."""
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    late: list = []
    page.route("**/api/sampling", lambda route: late.append(route))
    write(page, "The river", seed=3, max_tokens=10)
    page.locator(".token").nth(5).click()
    shown = page.inner_text("#view")
    assert "by the model, before any setting" in shown
    assert late
    for route in late:
        route.continue_()
    page.wait_for_timeout(300)
    assert page.inner_text("#view") == shown


def test_a_refused_request_keeps_the_text(address: str, page: Page) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    write(page, "The river", seed=3, max_tokens=10)
    before = texts(page, ".token")
    page.evaluate("() => { window.fetch = () => Promise.reject(new TypeError('the network')) }")
    page.click("#write")
    page.locator("#status.bad").wait_for()
    assert "atlas serve" in page.inner_text("#status")
    assert texts(page, ".token") == before


def test_two_models_write_side_by_side(address: str, page: Page) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    page.select_option("#beside", "second")
    write(page, "The", seed=1, max_tokens=15)
    assert texts(page, "#columns h2") == ["first", "second"]
    one, other = ("".join(texts(page, f"#columns > :nth-child({n}) .token")) for n in (1, 2))
    assert one.startswith("The")
    assert other.startswith("The")
    assert one != other


def test_stopping_ends_the_generation(address: str, page: Page) -> None:
    page.goto(address)
    page.locator("#model option").nth(1).wait_for(state="attached")
    page.fill("#settings [name=max_tokens]", "4000")
    page.fill("#settings [name=temperature]", "0")
    page.click("#write")
    page.locator(".token").nth(20).wait_for()
    page.keyboard.press("Escape")
    page.locator("#columns[aria-busy=false]").wait_for()
    count = page.locator(".token").count()
    page.wait_for_timeout(300)
    assert page.locator(".token").count() == count


def test_the_key_is_requested_and_kept(loaded: LoadedModel, page: Page) -> None:
    with served([Engine(loaded, "first", parallel=2, queue=2)], ServerSettings(api_key="secret")) as address:
        page.goto(address)
        page.fill("#key input", "secret")
        page.keyboard.press("Enter")
        page.locator("#model option").nth(0).wait_for(state="attached")
        write(page, "The", max_tokens=5)
        assert page.locator(".token").count() > 1
        page.reload()
        page.locator("#model option").nth(0).wait_for(state="attached")


# The page's requests, without a browser


def test_the_sampling_view_has_the_models_probabilities(address: str, loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("The river runs past")
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids]))[0, -1]
    answer = post(address, {"prompt": ids, "temperature": 0.5, "top_k": 7, "top_p": 1}, "/api/sampling")[1]
    probs = logits.softmax(-1)
    top = (logits / 0.5).topk(7)
    expected = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    assert answer["remaining"]["min_p"] == 7
    for candidate in answer["candidates"]:
        id, told = candidate["id"], candidate["probabilities"]
        assert told["model"] == pytest.approx(float(probs[id]), abs=1e-6)
        assert told["min_p"] == pytest.approx(expected.get(id, 0.0), abs=1e-6)
        assert candidate["removed_by"] == (None if id in expected else "top_k")


@pytest.mark.parametrize(
    ("route", "body", "says"),
    [
        ("attention", {"prompt": "The", "layer": 2}, "layer 2"),
        ("attention", {"prompt": "The", "layer": -1}, "layer"),
        ("layers", {"prompt": [10**6]}, "vocabulary"),
        ("layers", {"prompt": []}, "prompt"),
        ("sampling", {"prompt": "The", "temperature": "hot"}, "temperature"),
        ("write", {"prompt": "The", "alternatives": 1000}, "alternatives"),
        ("write", {"prompt": "The " * 500}, "context"),
        ("layers", {"model": "none"}, "none"),
    ],
)
def test_a_bad_request_gets_its_4xx(address: str, route: str, body: dict, says: str) -> None:
    status, answer = post(address, body, f"/api/{route}")
    assert 400 <= status < 500
    assert says in answer["error"]["message"]
    assert json.dumps(answer)


# Runs


def line(step: int, loss: float) -> str:
    record = {"kind": "train", "step": step, "loss": loss, "tokens": step * 100, "seconds": step / 2}
    return json.dumps({**record, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 200.0}) + "\n"


def test_curves_of_runs_grow_while_the_page_is_open(loaded: LoadedModel, tmp_path: Path, page: Page) -> None:
    """A run that grows, and a finished run in a subfolder."""
    growing, done = tmp_path / "metrics.jsonl", tmp_path / "older/metrics.jsonl"
    done.parent.mkdir()
    done.write_text("".join(line(step, 5.0) for step in range(1, 9)))
    growing.write_text("".join(line(step, 4 - step / 20) for step in range(1, 11)))
    engine = Engine(loaded, "first", parallel=2, queue=2)
    with served([engine], ServerSettings(runs=tmp_path)) as address:
        page.goto(f"{address}/runs")
        page.locator("#charts canvas").nth(0).wait_for()
        legend = page.locator("#charts")
        legend.get_by_text("older", exact=True).first.wait_for()
        page.locator("#charts", has_text="3.5000").wait_for()
        with growing.open("a") as file:
            file.writelines(line(step, 4 - step / 20) for step in range(11, 31))
        page.locator("#charts", has_text="2.5000").wait_for()
        assert page.locator("#charts canvas").count() >= 4
