"""The page at /chat in a real browser: a conversation, its tokens, and what is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from atlas.inference.load import LoadedModel
from atlas.serving.backends.engine import Engine
from atlas.tokenizer.chat import Message, encode_chat
from tests.served import random_model, served
from tests.serving.test_page import one_sign_for_no_character, texts
from tests.serving.test_serving import post

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=512)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel) -> Iterator[str]:
    engines = [Engine(loaded, "first", parallel=4, queue=8)]
    engines.append(Engine(random_model(chat=True, seed=1, max_seq_len=512), "second", parallel=4, queue=8))
    with served(engines) as address:
        yield address


def opened(page: Page, address: str) -> list[dict]:
    """Open the page with short answers of temperature 0; return the list of the bodies that it sends."""
    sent: list[dict] = []
    page.on(
        "request",
        lambda request: request.url.endswith("/api/chat") and sent.append(json.loads(request.post_data)),
    )
    page.goto(f"{address}/chat")
    page.locator("#model option").nth(1).wait_for(state="attached")
    page.click("summary")
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", "12")
    return sent


def send(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.click("#send")
    page.locator("#columns[aria-busy=false]").wait_for(state="attached")


def answer_to(address: str, messages: list[dict], model: str = "first") -> str:
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    return post(address, body, "/v1/chat/completions")[1]["choices"][0]["message"]["content"]


def test_person_talks_edits_and_sends_again(address: str, page: Page) -> None:
    sent = opened(page, address)
    page.fill("#system", "Be brief.")
    for text in ("Hello", "And now?", "Why?"):
        send(page, text)
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [each["role"] for each in sent[2]["messages"]] == roles
    assert texts(page, ".message.user .said") == ["Hello", "And now?", "Why?"]
    answers = texts(page, ".message:not(.user) .said")
    for number, body in enumerate(sent):
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        said = one_sign_for_no_character(answer_to(address, body["messages"]))
        assert one_sign_for_no_character(answers[number]) == said.strip()
    page.locator(".message.user").nth(1).get_by_text("Edit").click()
    page.get_by_label("Edit your message").fill("And then?")
    page.get_by_text("Send again").click()
    page.locator("#columns[aria-busy=false]").wait_for()
    assert texts(page, ".message.user .said") == ["Hello", "And then?"]
    assert [each["content"] for each in sent[3]["messages"] if each["role"] == "user"] == [
        "Hello",
        "And then?",
    ]
    assert sent[3]["messages"][2]["content"] == sent[1]["messages"][2]["content"]
    page.click("#reset")
    assert texts(page, ".message") == []
    send(page, "Anew")
    assert len(sent[4]["messages"]) == 2


def test_the_tokens_are_those_that_the_model_reads(address: str, loaded: LoadedModel, page: Page) -> None:
    opened(page, address)
    send(page, "Hello")
    given = page.locator("#raw .token.prompt").count()
    ids = encode_chat([Message("user", "Hello")], loaded.tokenizer)
    assert given == len(ids)
    shown = "".join(texts(page, "#raw .token.prompt"))
    assert shown == "<|user|>\nHello<|endoftext|>\n<|assistant|>\n"
    assert page.locator("#raw .token").count() > given
    page.locator("#raw .token").nth(given).click()
    assert "written by the model" in page.inner_text("#view")
    assert page.locator("#alternatives tr").count() == 10
    widths = [
        float(each.evaluate("bar => bar.style.width.slice(0, -1)"))
        for each in page.locator("#alternatives i").all()
    ]
    assert widths[0] == 100  # the bars are scaled to the largest
    page.keyboard.press("ArrowLeft")
    assert "read by the model" in page.inner_text("#view")
    assert page.evaluate("document.activeElement.dataset.index") == str(given - 1)


def test_two_models_answer_side_by_side(address: str, page: Page) -> None:
    sent = opened(page, address)
    page.select_option("#beside", "second")
    for text in ("Hello", "And now?"):
        send(page, text)
    assert texts(page, ".column h2") == ["first", "second"]
    for model in ("first", "second"):
        [_, second] = [body for body in sent if body["model"] == model]
        before = next(body for body in sent if body["model"] == model)
        said = one_sign_for_no_character(answer_to(address, before["messages"], model)).strip()
        assert (
            one_sign_for_no_character(second["messages"][1]["content"]) == said
        )  # each model has its own answers
    page.locator(".column").nth(1).get_by_text("Tokens").last.click()
    assert page.locator("#raw .token").count() > 0


def test_an_answer_can_be_stopped_and_errors_are_shown(address: str, page: Page) -> None:
    opened(page, address)
    page.fill("[name=max_tokens]", "4000")
    page.fill("#message", "Hello")
    page.keyboard.press("Control+Enter")
    page.locator("#raw .token:not(.prompt)").first.wait_for()
    page.keyboard.press("Escape")
    page.locator("#columns[aria-busy=false]").wait_for()
    page.fill("[name=temperature]", "9")
    send_count = page.locator(".message.user").count()
    page.fill("#message", "x")
    page.click("#send")
    assert page.locator(".message.user").count() == send_count  # the field says what is wrong


def test_a_model_that_cannot_chat_says_so_and_the_message_stays(browser: Browser) -> None:
    page = browser.new_page()  # the fixture `page` allows no failed request
    with served([Engine(random_model(), "plain", parallel=1, queue=1)]) as address:
        page.goto(f"{address}/chat")
        page.locator("#model option").first.wait_for(state="attached")
        send(page, "Hello")
        assert "was not trained on conversations" in page.inner_text("#status")
        assert page.input_value("#message") == "Hello"
        assert page.locator(".message").count() == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_phone(address: str, page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 360, "height": 740})
    opened(page, address)
    page.select_option("#beside", "second")
    send(page, "A question of a person who writes on a phone, with a longwordthatneverendsandnevereverends.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#send").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert (sum(json.loads(f"[{ink[4:-1]}]")) > sum(json.loads(f"[{paper[4:-1]}]"))) == (scheme == "dark")
