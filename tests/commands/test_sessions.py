"""Sessions from the command line: `--session`, `--continue`, and what they keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.conftest import Cli


def test_session_goes_on_where_the_last_run_ended(cli: Cli, png: str) -> None:
    cli("chat", "--session", "red", "--image", png, "-p", "first")
    cli("chat", "--session", "red", "-p", "second")
    seen = cli.backend.seen[1]
    assert [turn.user.text for turn in seen.turns] == ["first"]
    assert [image.source for image in seen.images] == [png]


def test_continue_takes_the_session_that_was_written_last(cli: Cli) -> None:
    cli("chat", "--session", "a", "-p", "one")
    cli("chat", "--session", "b", "-p", "two")
    cli("chat", "--continue", "-p", "three")
    assert [turn.user.text for turn in cli.backend.seen[2].turns] == ["two"]


def test_continue_looks_past_a_session_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    cli("chat", "--session", "a", "-p", "one")
    cli("chat", "--session", "b", "-p", "two")
    (broken,) = tmp_path.rglob("b.json")
    broken.write_text("{")
    run = cli("chat", "--continue", "-p", "three")
    assert [turn.user.text for turn in cli.backend.seen[2].turns] == ["one"]
    assert f"{broken}" in run.err
    assert "looking for an older session" in run.err


def test_session_keeps_model_system_and_sampling_when_no_flag_says_otherwise(cli: Cli) -> None:
    first = ["--model-path", "demo", "--system", "Be brief.", "--top-k", "5", "--seed", "1"]
    cli("chat", "--session", "a", "-p", "x", *first)
    cli("chat", "--session", "a", "-p", "x", "--seed", "2")
    assert cli.loaded[1].path == "demo"
    assert cli.backend.seen[1].system == "Be brief."
    assert (cli.backend.params[1].top_k, cli.backend.params[1].seed) == (5, 2)


def test_session_takes_a_flag_that_says_the_default(cli: Cli) -> None:
    cli("chat", "--session", "a", "-p", "x", "--top-k", "5", "--system", "Be brief.")
    cli("chat", "--session", "a", "-p", "x", "--top-k", "0", "--system", "")
    assert cli.backend.params[1].top_k == 0
    assert cli.backend.seen[1].system == ""


def test_session_remembers_a_model_folder_by_its_full_path(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    cli("chat", "--session", "a", "-p", "x", "--model-path", "model")
    cli("chat", "--session", "a", "-p", "x")
    assert cli.loaded[1].path == str(tmp_path / "model")


def test_continue_says_so_when_there_is_no_session(cli: Cli) -> None:
    run = cli("chat", "--continue", "-p", "x")
    assert run.code == 74
    assert run.err == "vlmchat: there is no session to continue; the first chat makes one\n"


def test_session_says_which_pictures_are_gone(cli: Cli, png: str, tmp_path: Path) -> None:
    cli("chat", "--session", "a", "--image", png, "-p", "x")
    for blob in (tmp_path / "state" / "vlmchat" / "blobs").iterdir():
        blob.unlink()
    run = cli("chat", "--session", "a", "-p", "x")
    assert run.code == 0
    assert f"the picture {png} of this session is gone" in run.err


def test_chat_leaves_no_session_behind_when_none_was_named(cli: Cli, tmp_path: Path) -> None:
    cli("chat", "-p", "x")
    assert not (tmp_path / "state").exists()
