"""The page, in a real browser, over scripted models."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image as PILImage

from tests.fakes import ScriptedBackend, picture
from tests.web.pages import Served, Workers, long_answer, scripted, served
from vlmchat.config import ImagePolicy
from vlmchat.errors import NetworkError
from vlmchat.web.moderation import Moderation
from vlmchat.web.page import EXAMPLES

Tab = Callable[..., Any]
# Gradio and pandas remark on each other; vlmchat web ignores it too.
pytestmark = pytest.mark.filterwarnings("ignore")
PAUSE = threading.Event()  # never set
PNG = {"name": "red.png", "mimeType": "image/png", "buffer": picture().data}


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    """Answers quickly, `You said: …` unless told otherwise."""
    return scripted()


@pytest.fixture(scope="module")
def page(
    backend: ScriptedBackend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Path]]:
    """A page with one model and a log."""
    logs = tmp_path_factory.mktemp("logs")
    with served(Workers({"scripted": backend}), log_dir=logs) as running:
        yield running, logs


def ask(tab: Any, text: str) -> None:
    tab.locator("#question textarea").fill(text)
    tab.locator("#question textarea").press("Enter")


def says(tab: Any, text: str, where: str = "#chat") -> None:
    tab.locator(where).get_by_text(text).first.wait_for()


def enabled(tab: Any, button: str) -> None:
    tab.locator(f"{button}:not([disabled])").wait_for()


def token(tab: Any) -> str:
    return str(tab.evaluate("sessionStorage.getItem('vlmchat')"))


def set_parameters(tab: Any, system: str, seed: str) -> None:
    tab.get_by_role("button", name="Parameters").click()
    tab.get_by_label("System prompt").fill(system)
    tab.get_by_label("Seed").fill(seed)


def attach(tab: Any, *files: Any) -> None:
    tab.locator('#question input[type="file"]').set_input_files(list(files))
    tab.locator("#question .thumbnail-item").first.wait_for()


def test_page_answers_a_question_about_an_uploaded_picture(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    browser.locator('#picture input[type="file"]').set_input_files([PNG])
    browser.locator("#waiting img").wait_for()
    ask(browser, "What is red?")
    says(browser, "You said: What is red?")
    assert [i.source for i in backend.seen[-1].images] == ["red.png"]
    image = browser.locator("#chat .pictures img")
    assert image.get_attribute("alt") == "red.png, 8 × 6 pixels"
    assert image.evaluate("i => i.complete && i.naturalWidth") == 8


def test_page_sends_several_pictures_pasted_with_the_question(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    blue = {"name": "b.png", "mimeType": "image/png", "buffer": picture("b.png", "blue").data}
    attach(browser, PNG, blue)
    ask(browser, "Compare them.")
    says(browser, "You said: Compare them.")
    assert len(backend.seen[-1].images) == 2


def test_page_streams_and_stop_ends_the_answer(tab: Tab) -> None:
    slow = scripted([long_answer()], delay_s=0.05)
    with served(Workers({"m": slow})) as running:
        browser = tab(running.url)
        ask(browser, "Go on.")
        says(browser, "word5")
        browser.locator("#stop").click()
        says(browser, "(stopped)")
        assert "word399" not in browser.locator("#chat").inner_text()
        enabled(browser, "#regenerate")


def test_page_regenerates_edits_undoes_and_clears(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    backend.answers[:] = ["first answer", "second answer", "third answer"]
    ask(browser, "Question one")
    says(browser, "first answer")
    browser.locator("#regenerate").click()
    says(browser, "second answer")
    assert "first answer" not in browser.locator("#chat").inner_text()
    browser.locator("#edit").click()
    browser.wait_for_function("document.querySelector('#question textarea').value != ''")
    ask(browser, "Question two")
    says(browser, "third answer")
    assert "Question one" not in browser.locator("#chat").inner_text()
    browser.locator("#undo").click()
    browser.wait_for_function(
        "document.querySelector('#question textarea').value == 'Question two'"
    )
    ask(browser, "Question three")
    says(browser, "You said: Question three")
    browser.locator("#clear").click()
    says(browser, "Add a picture and ask about it.")


def test_page_edits_an_earlier_question_and_drops_what_follows(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    for text in ("Is <b>this</b> one?", "Question two"):
        ask(browser, text)
        says(browser, f"You said: {text.replace('<b>this</b>', 'this')}")
        enabled(browser, "#undo")
    browser.locator("#chat a.edit").first.press("Enter")
    browser.wait_for_function(
        "document.querySelector('#question textarea').value == 'Is <b>this</b> one?'"
    )
    ask(browser, "Question three")
    says(browser, "You said: Question three")
    assert "Question two" not in browser.locator("#chat").inner_text()
    assert backend.seen[-1].turns == ()


def test_theme_button_turns_the_page_dark_and_is_remembered(
    page: tuple[Served, Path], tab: Tab
) -> None:
    browser = tab(page[0].url, color_scheme="light")
    browser.get_by_role("button", name="Dark mode").click()
    browser.locator("body.dark").wait_for()
    browser.reload()
    browser.locator("body.dark").wait_for()
    browser.get_by_role("button", name="Light mode").click()
    browser.locator("body:not(.dark)").wait_for()
    assert browser.locator("#theme").inner_text() == "Dark"


def test_page_keeps_the_conversation_when_an_answer_fails_and_retries_it(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    backend.answers[:] = ["fine", NetworkError("http://10.0.0.7: silent"), "back again"]
    ask(browser, "one")
    says(browser, "fine")
    ask(browser, "two")
    says(browser, "The model scripted went away", "[role=alert]")
    assert "fine" in browser.locator("#chat").inner_text()
    browser.locator("#retry").click()
    says(browser, "back again")
    assert len(backend.seen[-1].turns) == 1
    assert browser.locator("[role=alert]").count() == 0


def test_page_waits_for_a_model_and_names_one_that_went(tab: Tab) -> None:
    workers = Workers()
    with served(workers) as running:
        browser = tab(running.url)
        says(browser, "No model is there yet.", "#model-note")
        ask(browser, "hello")
        says(browser, "No model is there at present", "[role=alert]")
        workers.there["late"] = scripted()
        browser.wait_for_function("document.querySelector('#model input').value == 'late'")
        browser.locator("#retry").click()
        says(browser, "You said: hello")
        workers.there.clear()
        ask(browser, "again")
        says(browser, "The model late went away", "[role=alert]")
        says(browser, "late has gone. This page goes on by itself", "#model-note")
        workers.there["late"] = scripted()
        browser.locator("#retry").click()
        says(browser, "You said: again")


def test_page_honours_the_model_in_its_address(tab: Tab) -> None:
    with served(Workers({"a": scripted(), "b": scripted()})) as running:
        browser = tab(f"{running.url}/?model=b")
        browser.wait_for_function("document.querySelector('#model input').value == 'b'")


def test_page_keeps_two_tabs_apart(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    one, two = tab(page[0].url), tab(page[0].url)
    ask(one, "my secret")
    says(one, "You said: my secret")
    ask(two, "hello")
    says(two, "You said: hello")
    assert "secret" not in two.locator("#chat").inner_text()
    assert backend.seen[-1].turns == ()


def test_page_that_is_loaded_again_goes_on_with_its_conversation(tab: Tab) -> None:
    backend = scripted(["Blue.", long_answer(3000), "Seven."], delay_s=0.02)
    with served(Workers({"m": backend})) as running:
        browser = tab(running.url)
        set_parameters(browser, "Be brief.", "42")
        attach(browser, PNG)
        ask(browser, "Which colour?")
        says(browser, "Blue.")
        ask(browser, "Go on.")
        says(browser, "word5")
        browser.reload()
        says(browser, "Blue.")
        says(browser, "word5")  # what was said before it stopped
        other = browser.context.new_page()  # as if the tab had been doubled
        other.goto(running.url)
        other.evaluate(f"sessionStorage.setItem('vlmchat', {token(browser)!r})")
        other.reload()
        says(other, "Add a picture and ask about it.")
        enabled(browser, "#undo")
        ask(browser, "How many?")
        says(browser, "Seven.")
        assert [turn.user.text for turn in backend.seen[-1].turns] == ["Which colour?", "Go on."]
        assert len(backend.seen[-1].images) == 1
        assert (backend.seen[-1].system, backend.params[-1].seed) == ("Be brief.", 42)


def test_closed_tab_stops_its_answer_and_is_forgotten(tab: Tab) -> None:
    slow = scripted([long_answer(3000)], delay_s=0.02)
    with served(Workers({"m": slow})) as running:
        browser = tab(running.url)
        ask(browser, "Go on.")
        says(browser, "word5")
        (person,) = running.people._people.values()
        browser.context.close()
        for _ in range(500):
            if not person.busy and not len(running.people):
                break
            PAUSE.wait(0.02)
        assert not person.busy
        assert len(running.people) == 0


def test_page_says_what_is_wrong_with_a_picture(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url)
    text = {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"just some words"}
    attach(browser, text)
    ask(browser, "What is this?")
    says(browser, "Notes.jpg is text, not a picture", "[role=alert]")
    assert browser.locator("#question textarea").input_value() == "What is this?"


def test_file_that_is_no_conversation_is_told_of_kindly(
    page: tuple[Served, Path], tab: Tab
) -> None:
    browser = tab(page[0].url)
    file = {"name": "x.json", "mimeType": "application/json", "buffer": b"{}"}
    browser.locator('input[type="file"][accept=".json"]').set_input_files([file])
    says(browser, "This file is no exported conversation", "[role=alert]")


class Elsewhere(BaseHTTPRequestHandler):
    """Another site: a picture, a page, and a service that judges questions."""

    def do_GET(self) -> None:
        a_page = self.path == "/page"
        self._send("text/html" if a_page else "image/png", b"<p>hi" if a_page else picture().data)

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        judged = {"results": [{"flagged": "bad" in said}]}
        self._send("application/json", json.dumps(judged).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _send(self, kind: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "allowed", "where", "told"),
    [
        ("p.png", False, "[role=alert]", "Pictures are fetched from public addresses only"),
        ("page", True, "[role=alert]", "give the address of the picture itself"),
        ("p.png", True, "#waiting-names", "/p.png"),
    ],
)
def test_page_fetches_a_picture_by_its_address(
    tab: Tab, elsewhere: str, name: str, allowed: bool, where: str, told: str
) -> None:
    policy = ImagePolicy(allow_private_urls=allowed, allow_local_files=False)
    with served(Workers({"m": scripted()}), policy) as running:
        browser = tab(running.url)
        browser.locator("#address textarea").fill(f"{elsewhere}/{name}")
        browser.locator("#address button").click()
        says(browser, told, where)


def test_question_that_moderation_flags_is_in_the_box_to_be_changed(
    tab: Tab, elsewhere: str
) -> None:
    backend = scripted()
    with served(Workers({"m": backend}), moderation=Moderation(elsewhere, None)) as running:
        browser = tab(running.url)
        attach(browser, PNG)
        ask(browser, "a bad one")
        says(browser, "This question breaks the rules of this page", "[role=alert]")
        browser.wait_for_function(
            "document.querySelector('#question textarea').value == 'a bad one'"
        )
        ask(browser, "a good one")
        says(browser, "You said: a good one")
    (asked,) = backend.seen
    assert (len(asked.turns), len(asked.images)) == (0, 1)


def test_page_takes_a_picture_by_the_camera(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url, permissions=["camera"])
    browser.get_by_role("button", name="Capture from camera").click()
    browser.get_by_text("Click to Access Webcam").click()
    browser.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    browser.get_by_role("button", name="capture photo").click()
    browser.locator("#waiting img").wait_for()


def test_page_refuses_a_file_with_too_many_bytes(tab: Tab) -> None:
    policy = ImagePolicy(max_bytes=1000, allow_local_files=False)
    with served(Workers({"m": scripted()}), policy) as running:
        browser = tab(running.url)
        file = {**PNG, "buffer": bytes(2000)}
        browser.locator('#picture input[type="file"]').set_input_files([file])
        says(browser, "maximum allowed size", ".toast-body")


def test_page_names_its_own_control_for_a_seed_that_cannot_be(
    page: tuple[Served, Path], tab: Tab
) -> None:
    browser = tab(page[0].url)
    browser.get_by_role("button", name="Parameters").click()
    browser.get_by_label("Seed", exact=True).fill(str(2**63))
    ask(browser, "one")
    says(browser, "Seed is '9223372036854775808'; it must be a whole number", "[role=alert]")
    assert browser.locator("#question textarea").input_value() == "one"


def test_screen_readers_are_told_the_words_of_a_message_alone(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    backend.answers[:] = ["A **red** one.\n\n- round"]
    attach(browser, PNG)
    ask(browser, "Is <b>this</b> `a<b`?")
    says(browser, "round")
    browser.locator('#chat [aria-label="A red one. round"]').wait_for()
    labels = browser.locator("#chat [data-testid=user]").evaluate_all(
        "found => found.map(e => e.ariaLabel)"
    )
    assert labels == ["picture: red.png, 8 × 6 pixels.", "Is <b>this</b> a<b?"]


def test_changed_question_that_failed_is_in_the_box_and_can_be_corrected(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url)
    backend.answers[:] = ["fine", NetworkError("silent"), NetworkError("silent"), "better"]
    ask(browser, "one")
    says(browser, "fine")
    browser.locator("#chat a.edit").click()
    for text in ("wrong", "right"):
        browser.wait_for_function("document.querySelector('#question textarea').value != ''")
        ask(browser, text)
        says(browser, text)
        browser.wait_for_function(f"document.querySelector('#question textarea').value == '{text}'")
    browser.locator("#question textarea").fill("quite right")
    browser.locator("#retry").click()
    says(browser, "better")
    asked = backend.seen[-1]
    assert asked.pending is not None
    assert (asked.pending.text, asked.turns) == ("quite right", ())
    browser.wait_for_function("document.querySelector('#question textarea').value == ''")


@pytest.mark.parametrize("size", [(1280, 860), (1280, 720), (390, 844)])
def test_question_and_buttons_are_on_the_screen_whatever_else_is(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab, size: tuple[int, int]
) -> None:
    browser = tab(page[0].url, viewport={"width": size[0], "height": size[1]})
    backend.answers[:] = [long_answer(), NetworkError("silent")]
    ask(browser, "one")
    enabled(browser, "#undo")
    ask(browser, "two")
    browser.locator("#retry").wait_for()
    for color in ("red", "blue", "green"):
        browser.locator('#picture input[type="file"]').set_input_files(
            [{**PNG, "name": f"{color}.png", "buffer": picture(color, color, (800, 600)).data}]
        )
        browser.locator(f"#waiting img[alt^='{color}.png']").wait_for()
    for edited in (False, True):
        if edited:
            browser.locator("#chat a.edit").first.press("Enter")
            says(browser, "Question 1, to be changed", "#question")
        for control in ("#question", "#actions", "#waiting", "#chat"):
            box = browser.locator(control).bounding_box()
            assert box["y"] >= 0
            assert box["y"] + box["height"] <= size[1], control
        assert browser.locator("#chat").bounding_box()["height"] >= 100
        if not edited:
            retry, told = (browser.locator(i).bounding_box() for i in ("#retry", ".trouble"))
            assert retry["width"] < 120
            assert told["y"] <= retry["y"] + retry["height"] / 2 <= told["y"] + told["height"]


def test_everything_to_touch_is_large_enough_on_a_phone(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab
) -> None:
    browser = tab(page[0].url, viewport={"width": 390, "height": 844}, has_touch=True)
    backend.answers[:] = ["```\ncode\n```"]
    attach(browser, PNG)
    ask(browser, "one")
    enabled(browser, "#undo")
    small = browser.evaluate(
        """() => [...document.querySelectorAll('button, a')].filter(e => e.offsetParent)
        .map(e => [e.getBoundingClientRect(), e.outerHTML.slice(0, 120)])
        .filter(([box]) => Math.min(box.width, box.height) < 30).map(([, html]) => html)"""
    )
    assert small == []


def test_page_takes_a_picture_that_is_also_an_example(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url)
    name, _ = EXAMPLES[1]
    for icon in page[0].page.examples[1].temp_files:
        browser.locator('#picture input[type="file"]').set_input_files([icon])
        browser.locator(f"#waiting img[alt^='{name}']").wait_for()
        assert Path(icon).is_file()


def test_page_refuses_a_picture_with_too_many_pixels(tab: Tab) -> None:
    file = BytesIO()
    PILImage.new("RGB", (400, 300)).save(file, "PNG")
    photo = {"name": "photo.png", "mimeType": "image/png", "buffer": file.getvalue()}
    policy = ImagePolicy(max_pixels=100_000, allow_local_files=False)
    with served(Workers({"m": scripted()}), policy) as running:
        browser = tab(running.url)
        browser.locator('#picture input[type="file"]').set_input_files([photo])
        says(browser, "400x300", "[role=alert]")


def test_votes_and_chats_are_logged_as_llava_does(page: tuple[Served, Path], tab: Tab) -> None:
    browser, logs = tab(page[0].url), page[1]
    attach(browser, PNG)
    ask(browser, "vote for me")
    says(browser, "You said: vote for me")
    enabled(browser, "#upvote")
    browser.locator("#upvote").click()
    browser.get_by_role("button", name="✓ Good answer", disabled=True).wait_for()
    (file,) = logs.glob("*-conv.json")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    chat, vote = [r for r in records if "vote for me" in str(r)]
    assert (chat["type"], vote["type"]) == ("chat", "upvote")
    assert chat["state"]["messages"][0] == ["USER", "vote for me\n<image>"]
    assert len(list(logs.glob(f"serve_images/*/{chat['images'][0]}.jpg"))) == 1


def test_exported_conversation_can_be_imported(
    page: tuple[Served, Path], backend: ScriptedBackend, tab: Tab, tmp_path: Path
) -> None:
    browser = tab(page[0].url)
    set_parameters(browser, "Be brief.", "42")
    attach(browser, PNG)
    ask(browser, "remember this")
    says(browser, "You said: remember this")
    with browser.expect_download() as download:
        browser.locator("a.export").click()
    download.value.save_as(tmp_path / "chat.json")
    other = tab(page[0].url)
    other.locator('input[type="file"][accept=".json"]').set_input_files(tmp_path / "chat.json")
    says(other, "You said: remember this")
    ask(other, "and now?")
    says(other, "You said: and now?")
    assert [t.user.text for t in backend.seen[-1].turns] == ["remember this"]
    assert len(backend.seen[-1].images) == 1
    assert (backend.seen[-1].system, backend.params[-1].seed) == ("Be brief.", 42)


def test_page_asks_no_other_host_for_anything(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url)
    ask(browser, "hello")
    says(browser, "You said: hello")
    hosts = {urlsplit(url).netloc for url in browser.requested if url.startswith("http")}
    assert hosts == {urlsplit(page[0].url).netloc}


def test_page_fits_a_phone(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url, viewport={"width": 375, "height": 720})
    ask(browser, "hello from a phone")
    says(browser, "You said: hello from a phone")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 375
    chat, model = (browser.locator(i).bounding_box() for i in ("#chat", "#model"))
    assert chat["y"] < model["y"]
    browser.locator("#examples button").last.click()
    browser.locator("#waiting img").wait_for()
    assert browser.locator("#chat").bounding_box()["y"] >= 0


def test_page_can_be_used_by_keyboard_alone(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url)
    browser.locator("#question textarea").focus()
    browser.keyboard.type("typed")
    browser.keyboard.press("Enter")
    says(browser, "You said: typed")
    enabled(browser, "#undo")
    for _ in range(12):
        browser.keyboard.press("Tab")
        if browser.evaluate("document.activeElement.id") == "undo":
            break
    browser.keyboard.press("Enter")
    browser.wait_for_function("document.querySelector('#question textarea').value == 'typed'")


def test_every_control_has_a_name(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url)
    nameless = browser.evaluate(
        """() => [...document.querySelectorAll('button, textarea, input:not([type=file])')]
        .filter(e => e.offsetParent && !(e.innerText || e.ariaLabel || e.title
          || (e.labels && e.labels.length) || e.closest('label')
          || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []


def test_page_shows_how_full_the_context_is(page: tuple[Served, Path], tab: Tab) -> None:
    browser = tab(page[0].url)
    ask(browser, "how full")
    says(browser, "context:", "#facts")
    assert re.search(r"context: \d+ of 2048 tokens", browser.locator("#facts").inner_text())
