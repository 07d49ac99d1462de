"""What every test starts from: no settings of whoever runs it, folders of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("vlmchat", deadline=None)  # a busy machine is no failure
settings.load_profile("vlmchat")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No VLMCHAT_* and no terminal settings; config and state live in the test's folder."""
    for name in os.environ:
        if name.startswith("VLMCHAT_") or name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
