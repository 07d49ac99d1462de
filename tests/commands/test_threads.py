"""Threads: few spins, as many as the container allows, and what the user has set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlmchat.commands.threads import cpu_quota, settle


def test_threads_spin_little_and_keep_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    env: dict[str, str] = {}
    settle(env, 2.5)
    assert env == {"GOMP_SPINCOUNT": "20000", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    "env", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "9"}]
)
def test_threads_stay_as_the_user_has_set_them(env: dict[str, str]) -> None:
    before = dict(env)
    settle(env, None if "OMP_WAIT_POLICY" in env else 0.5)
    assert env == before


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cpu_quota_is_read_in_both_layouts(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota
