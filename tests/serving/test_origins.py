"""Pages of other sites: with `--allow-origin` they may use the server, without it they may not."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from atlas.cli.serve import _origin
from atlas.errors import AtlasError
from atlas.serving.dispatcher import ServerSettings
from tests.served import random_model, served_model
from tests.serving.test_serving import post

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ASK = """async (address) => {
    const body = JSON.stringify({prompt: "The river", max_tokens: 5, temperature: 0, colour: "red"});
    const headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"};
    try {
        const answer = await fetch(address + "/v1/completions", {method: "POST", headers, body});
        const text = (await answer.json()).choices[0].text;
        return [answer.status, text, answer.headers.get("X-Ignored-Fields")];
    } catch (error) { return String(error); }
}"""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """The origin of another server, whose page is empty."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def preflight(address: str, origin: str) -> tuple[int, dict[str, str]]:
    names = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    names["Access-Control-Request-Headers"] = "authorization,content-type"
    request = urllib.request.Request(f"{address}/v1/completions", headers=names, method="OPTIONS")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}


@pytest.mark.parametrize("allowed", ["the page's", "*"])
@pytest.mark.parametrize("api_key", [None, "secret"])
def test_a_page_of_an_allowed_origin_uses_the_server(
    elsewhere: str, browser: Browser, allowed: str, api_key: str | None
) -> None:
    origins = (elsewhere if allowed != "*" else "*",)
    with served_model(random_model(), settings=ServerSettings(origins=origins, api_key=api_key)) as (
        address,
        _,
    ):
        page = browser.new_page()
        page.goto(elsewhere)
        body = {"prompt": "The river", "max_tokens": 5, "temperature": 0}
        expected = post(address, body, Authorization="Bearer secret")[1]["choices"][0]["text"]
        assert page.evaluate(ASK, address) == [200, expected, "colour"]
        page.close()


def test_a_page_of_another_origin_is_refused(elsewhere: str, browser: Browser) -> None:
    for origins in ((), ("https://example.com",)):
        with served_model(random_model(), settings=ServerSettings(origins=origins)) as (address, _):
            page = browser.new_page()
            page.goto(elsewhere)
            assert "Failed to fetch" in page.evaluate(ASK, address)
            page.close()
            status, headers = preflight(address, elsewhere)
            assert status >= 400
            assert "access-control-allow-origin" not in headers
            status, answer = post(address, {"prompt": "x", "max_tokens": 1}, Origin=elsewhere)
            assert (status, "--allow-origin" in answer["error"]["message"]) == (403, True)


def test_an_error_can_be_read_by_an_allowed_page() -> None:
    origin = "https://example.com"
    with served_model(random_model(), settings=ServerSettings(origins=(origin,))) as (address, _):
        status, headers = preflight(address, origin)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        for body in (b"{", b"x" * (2 << 20)):
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Origin": origin})
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=30)
            assert error.value.headers["Access-Control-Allow-Origin"] == origin
        # A host of another site stays refused: the page may be that of an attacker who changed the DNS.
        assert post(address, {"prompt": "x"}, Origin=origin, Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Example.com/", "https://example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("https://example.com:443", "https://example.com"),
        ("http://example.com:443", "http://example.com:443"),
        ("https://bücher.de", "https://xn--bcher-kva.de"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_an_origin_is_read_as_browsers_send_it(text: str, origin: str) -> None:
    assert _origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "http://a:99999999",
        "http://a\\b",
        'http://"x"',
        "https://a@b.example",
        "example.com",
        "https://example.com/page",
        "",
        "https://",
        "https://*.example.com",
    ],
)
def test_what_is_not_an_origin_is_refused(text: str) -> None:
    with pytest.raises(AtlasError, match="--allow-origin"):
        _origin(text)
