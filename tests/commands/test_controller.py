"""`vlmchat controller` and `vlmchat status`, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from vlmchat.commands.options import AccessOptions
from vlmchat.errors import ConfigError

ROOT = Path(__file__).parents[2]


def vlmchat(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlmchat", *arguments],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@contextmanager
def controller(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; it ends well on SIGTERM."""
    process = vlmchat("controller", "--port", "0", "--json", *arguments)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["type"], ready["url"].endswith(f":{ready['port']}")) == ("ready", True)
        yield process, ready["url"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_controller_serves_and_status_shows_it() -> None:
    with controller("--dispatch-method", "lottery") as (_, url):
        assert httpx2.post(f"{url}/list_models").content == b'{"models":[]}'
        code, out, _ = ended(vlmchat("status", "--controller-url", url, "--json"))
        shown = json.loads(out)
        assert (code, shown["dispatch_method"], shown["workers"]) == (0, "lottery", [])
        code, out, _ = ended(vlmchat("status", "--controller-url", url))
        assert (code, "lottery, 0 requests" in out, "models: none" in out) == (0, True, True)


def test_controller_with_a_key_answers_those_who_have_it() -> None:
    with controller("--api-key", "k") as (_, url):
        code, _, err = ended(vlmchat("status", "--controller-url", url))
        assert (code, "a key is needed" in err) == (69, True)
        code, _, _ = ended(vlmchat("status", "--controller-url", url, "--api-key", "k"))
        assert code == 0


def test_controller_warns_when_others_can_reach_it_without_a_key() -> None:
    with controller("--host", "0.0.0.0", "--allow-worker", "10.0.0.0/8") as (process, _):
        process.send_signal(signal.SIGTERM)
        _, _, err = ended(process)
    assert "--api-key sets a key" in err
    assert "--registration-key sets a key" in err


def test_controller_says_so_when_its_port_is_taken() -> None:
    with controller() as (_, url):
        code, _, err = ended(vlmchat("controller", "--port", url.rsplit(":", 1)[1]))
    assert (code, "address already in use" in err) == (2, True)


def test_controller_takes_every_key_of_the_variable_and_status_sends_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLMCHAT_API_KEY", "k1\nk2")
    with controller() as (_, url):
        for key, code in (("k1", 200), ("k2", 200), ("k3", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx2.post(f"{url}/list_models", headers=headers).status_code == code
        code, _, err = ended(vlmchat("status", "--controller-url", url))
        assert code == 0, err


def test_status_says_who_does_not_answer() -> None:
    code, _, err = ended(vlmchat("status", "--controller-url", "http://127.0.0.1:9"))
    assert (code, "is the controller running?" in err) == (69, True)


def test_access_keys_come_from_flags_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert AccessOptions(api_keys=("zero",), api_key_file=file).keys() == ("zero", "one", "two")
    for bad in (
        AccessOptions(api_key_file=tmp_path / "none"),
        AccessOptions(api_keys=(" ",)),
        AccessOptions(registration_key=" "),
    ):
        with pytest.raises(ConfigError):
            bad.keys()
