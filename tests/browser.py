"""A browser for tests of the web application: Debian's chromium, without its own traffic."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update")
TIMEOUT_MS = 60_000  # a busy machine


def require_browser() -> None:
    """Skip the tests of a module without gradio, playwright or chromium."""
    for name in ("gradio", "playwright"):
        pytest.importorskip(name)
    if CHROMIUM is None:
        pytest.skip(
            "chromium is not installed: tests in a browser left out", allow_module_level=True
        )


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """A page in its own session, and what went wrong in it.

    Attributes:
        page: page of playwright.
        errors: errors in the console and uncaught exceptions.
        outside: addresses of other servers that the page asked for.
    """

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._on_message)
        self.page.on("request", lambda request: self._on_request(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#draw")

    def _on_message(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _on_request(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.outside.append(url)

    def draw(self) -> None:
        """Click on Draw and wait for the whole film."""
        self.page.evaluate("document.querySelector('#film .film').dataset.done = false")
        self.page.click("#draw")
        self.page.wait_for_selector("#film .film[data-done=true]")

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )

    def pixels(self, selector: str) -> str:
        """Content of a canvas."""
        return self.page.evaluate(f"document.querySelector('{selector}').toDataURL()")
