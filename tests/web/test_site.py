"""What the page's server refuses, and what it tells browsers."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gradio.route_utils import delete_files_created_by_app

from tests.web.pages import Served, Workers, scripted, served

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def page() -> Iterator[Served]:
    with served(Workers({"m": scripted()})) as running:
        yield running


@pytest.fixture
def http(page: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=page.url, trust_env=False, timeout=20) as client:
        yield client


def _event(http: httpx2.Client, target: str, data: list[Any], tab: str) -> str:
    """What the page is told after an event on the element `target`."""
    config = http.get("/config").json()
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    name, event = target.split(".")
    index = next(
        d["id"] for d in config["dependencies"] if [ids[name], event] in map(list, d["targets"])
    )
    body = {"data": data, "fn_index": index, "session_hash": tab, "event_data": None}
    http.post("/gradio_api/queue/join", json=body).raise_for_status()
    told = ""
    with http.stream("GET", f"/gradio_api/queue/data?session_hash={tab}") as stream:
        for line in stream.iter_lines():
            told += line + "\n"
            if "process_completed" in line or "close_stream" in line:
                break
    return told


@pytest.mark.parametrize("target", ["import.upload", "picture.input"])
def test_page_opens_no_file_of_this_machine_for_a_browser(
    page: Served, http: httpx2.Client, tmp_path: Path, target: str
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"format": "hidden words"}))
    for path in (str(secret), f"{page.url}/config", "/etc/passwd"):
        file = {"path": path, "orig_name": "x.json", "meta": {"_type": "gradio.FileData"}}
        told = _event(http, target, [file], "tab1")
        assert '"success":false' in told
        assert "vlmchat-session" not in told
    assert secret.exists()


def test_page_fetches_no_private_address(http: httpx2.Client, page: Served) -> None:
    told = _event(http, "address.submit", [f"{page.url}/config"], "tab3")
    assert "fetched from public addresses only" in told


def test_files_beside_the_page_are_not_served(http: httpx2.Client, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("hidden")
    for path in (tmp_path / "words.txt", Path(__file__), Path("/etc/passwd")):
        assert http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_picture_needs_the_person_s_secret(http: httpx2.Client) -> None:
    assert http.get("/picture/guess/0").status_code == 404
    assert http.get("/conversation/guess").status_code == 404


def test_page_on_loopback_answers_to_hosts_of_this_machine_only(http: httpx2.Client) -> None:
    assert http.get("/", headers={"host": "rebound.example"}).status_code == 403
    assert http.get("/", headers={"host": "localhost"}).status_code == 200


def test_page_tells_browsers_to_load_nothing_from_elsewhere(http: httpx2.Client) -> None:
    policy = http.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "frame-ancestors 'self'" in policy


def test_page_may_stand_in_frames_when_embedded() -> None:
    with served(Workers(), embed=True) as running:
        told = httpx2.get(running.url, trust_env=False, timeout=20)
    assert "frame-ancestors *" in told.headers["content-security-policy"]


def test_page_leaves_no_event_loop_open() -> None:
    def loops() -> set[int]:
        found = (o for o in gc.get_objects() if isinstance(o, asyncio.BaseEventLoop))
        return {id(loop) for loop in found if not loop.is_closed()}

    before = loops()
    with served(Workers()):
        pass
    assert loops() <= before


def test_icons_of_the_examples_outlive_the_cleaning_of_uploads(page: Served) -> None:
    icons = [Path(icon) for example in page.page.examples for icon in example.temp_files]
    delete_files_created_by_app(page.page.blocks, -1)
    assert len(icons) == 3
    assert all(icon.is_file() for icon in icons)
