"""A page in the system's Chromium that collects its errors, for tests of the pages.

tests/conftest.py makes the fixture known to all modules.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = ["--no-sandbox", "--disable-background-networking"]
_HERE = {"", "127.0.0.1", "localhost"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Started once per module, since a start takes a second."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is on PATH")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A blank page of 1280 × 900. At the end of the test it must have logged no message, thrown no error, and sent no
    request to another host."""
    troubles: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.on("console", lambda said: troubles.append(said.text))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("request", lambda request: troubles.extend(_elsewhere(request.url)))
    yield opened
    opened.close()
    assert troubles == []


def _elsewhere(url: str) -> list[str]:
    parts = urlsplit(url)
    is_here = parts.scheme in ("file", "data", "blob", "about") or parts.hostname in _HERE
    return [] if is_here else [f"asked of another host: {url}"]
