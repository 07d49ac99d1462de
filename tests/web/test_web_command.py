"""`vlmchat web` as people start it, with the demo model, alone and before a controller's workers.

With PAGE_PICTURES=DIR the pictures of docs/web.md are written there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Tab = Callable[..., Any]
Start = Callable[..., dict[str, Any]]


@contextmanager
def program(*arguments: str) -> Iterator[dict[str, Any]]:
    """`vlmchat …` until the `with` ends; gives what it says once it is ready."""
    command = [sys.executable, "-m", "vlmchat", *arguments, "--json"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            assert process.stdout is not None
            yield {**json.loads(process.stdout.readline()), "process": process, "stderr": said}
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs that end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(program(*arguments))


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of a page with the demo model in its process."""
    with program("web", "--model-path", "demo", "--port", "0") as ready:
        yield ready["url"]


def says(tab: Any, pattern: str, where: str = "#chat") -> None:
    tab.locator(where).get_by_text(re.compile(pattern)).first.wait_for(timeout=30_000)


def send(tab: Any) -> None:
    tab.wait_for_function("document.querySelector('#question textarea').value != ''")
    tab.locator("#waiting img").first.wait_for()
    tab.locator("#question textarea").press("Enter")


def ask(tab: Any, text: str) -> None:
    tab.locator("#undo:not([disabled])").wait_for(timeout=30_000)  # the answer before is over
    tab.locator("#question textarea").fill(text)
    tab.locator("#question textarea").press("Enter")


def keep(tab: Any, name: str) -> None:
    if folder := os.environ.get("PAGE_PICTURES"):
        tab.evaluate("scrollTo(0, 0)")
        tab.wait_for_timeout(800)
        tab.screenshot(path=Path(folder) / f"{name}.png")


def test_web_answers_an_example_with_the_demo_model(demo: str, tab: Tab) -> None:
    browser = tab(demo, viewport={"width": 1200, "height": 960})
    browser.get_by_role("button", name="Describe the image.").click()
    send(browser)
    says(browser, "red circle")
    says(browser, r"tokens/s", "#facts")
    ask(browser, "What colour is the star?")
    says(browser, "[Ss]tar is green|is green")
    browser.locator("#undo:not([disabled])").wait_for()
    keep(browser, "web")


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_web_looks_as_documented(demo: str, tab: Tab, name: str) -> None:
    sizes = {"dark": (1200, 780), "phone": (390, 780)}
    size = {"width": sizes[name][0], "height": sizes[name][1]}
    browser = tab(demo, viewport=size, color_scheme="dark" if name == "dark" else "light")
    browser.locator("#left").get_by_role("button", name="How many shapes are there?").click()
    send(browser)
    browser.locator("#undo:not([disabled])").wait_for()
    is_dark = browser.evaluate("document.body.classList.contains('dark')")
    assert is_dark == (name == "dark")
    keep(browser, f"web-{name}")


def test_conversation_outlives_the_workers_of_its_model(start: Start, tab: Tab) -> None:
    controller = start("controller", "--port", "0")
    where = ("--controller-address", controller["url"], "--model-path", "demo", "--port", "0")
    workers = {w["url"]: w["process"] for w in (start("worker", *where), start("worker", *where))}
    page = start("web", "--controller-url", controller["url"], "--port", "0")
    browser = tab(page["url"])
    browser.get_by_role("button", name="Describe the image.").click()
    send(browser)
    says(browser, "red circle")
    gone, left = list(workers)
    os.kill(workers[gone].pid, signal.SIGKILL)
    ask(browser, "Is there a red circle?")
    says(browser, "Yes")
    browser.locator("#undo:not([disabled])").wait_for()  # the answer is whole
    os.kill(workers[left].pid, signal.SIGKILL)
    ask(browser, "Where is the star?")
    says(browser, "The model demo went away", "[role=alert]")
    says(browser, "This page goes on by itself", "#model-note")
    assert "red circle" in browser.locator("#chat").inner_text()
    start("worker", *where)
    browser.locator("#model-note b").wait_for(state="detached", timeout=30_000)
    browser.locator("#retry").click()
    says(browser, "in the top right", "#chat .bot >> nth=2")


def test_web_ends_without_a_stack_while_a_page_is_open(start: Start, tab: Tab) -> None:
    web = start("web", "--controller-url", "http://127.0.0.1:9", "--port", "0")
    browser = tab(web["url"])
    says(browser, "The server does not answer.", "#model-note")
    web["process"].send_signal(signal.SIGINT)
    assert web["process"].wait(30) == 0
    web["stderr"].seek(0)
    told = web["stderr"].read()
    assert "no list of models from http://127.0.0.1:9" in told
    assert "Traceback" not in told
