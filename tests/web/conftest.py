"""A real Chromium for the tests of the page; without one they are skipped, and say so."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_configure() -> None:
    """Uploads go to a folder of the test run's own: Gradio reads this when it is imported."""
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="vlmchat-test-web-"))
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser. With NEEDS_BROWSER set, as on CI, its absence is an error."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        if os.environ.get("NEEDS_BROWSER"):
            pytest.fail("no Chromium is installed, and NEEDS_BROWSER is set")
        pytest.skip("no Chromium is installed: the page was not looked at in a browser")
    with sync_api.sync_playwright() as playwright:
        camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
        args = ["--no-sandbox", *camera]
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a fresh browser profile; `tab(url, viewport=…)`."""
    with ExitStack() as stack:

        def open_tab(url: str, **options: Any) -> Any:
            context = stack.enter_context(chromium.new_context(**options))
            context.set_default_timeout(8_000)
            page = context.new_page()
            page.requested = []
            page.on("request", lambda request: page.requested.append(request.url))
            page.goto(url)
            page.locator("#question textarea").wait_for()
            return page

        yield open_tab
