"""A headless Chromium, for tests of what people look at. Skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser_page(*, scheme: str = "light", width: int = 1280, height: int = 860) -> Iterator[Page]:
    """A Playwright page. At the end: nothing was said on its console, and no other host was asked for anything."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip("needs Chromium, such as Debian's package chromium")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: problems.extend(_elsewhere(request.url)))
        try:
            yield page
        finally:
            browser.close()
    assert problems == []


@pytest.fixture
def page() -> Iterator[Page]:
    """The same as a fixture, which a test module takes by importing its name."""
    with browser_page(height=900) as opened:
        yield opened


def _elsewhere(url: str) -> list[str]:
    parts = urlsplit(url)
    is_here = parts.scheme in ("file", "data", "blob", "about") or parts.hostname in (
        "127.0.0.1",
        "localhost",
    )
    return [] if is_here else [f"request: {url}"]
