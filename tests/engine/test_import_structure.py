"""What transformers learns of its own sources, kept from one process to the next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

READ = """
from vlmchat.engine.import_structure import remember_import_structure
{0}
import transformers
from transformers.utils.import_utils import define_import_structure
models = define_import_structure(transformers.__path__[0] + "/models", prefix="models")
print(sorted((sorted(n), m, sorted(names)) for n, d in models.items() for m, names in d.items()))
"""
REMEMBER = "remember_import_structure()"


def names(cache: Path, script: str = READ.format(REMEMBER)) -> str:
    """What is defined in transformers' models, in the words of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As transformers reads it by itself."""
    return names(tmp_path_factory.mktemp("cache"), READ.format(""))


def test_structure_is_the_same_when_read_and_when_kept(expected: str, tmp_path: Path) -> None:
    assert names(tmp_path) == expected
    (file,) = (tmp_path / "vlmchat").iterdir()
    assert names(tmp_path) == expected
    kept = [
        [needed, {f"x{m}": n for m, n in d.items()}] for needed, d in json.loads(file.read_text())
    ]
    file.write_text(json.dumps(kept))
    assert "'models.xllava.modeling_llava'" in names(tmp_path)


@pytest.mark.parametrize("damage", ["", "[[1, 2]]", '{"a": 1}', "[["])
def test_damaged_file_is_written_anew(expected: str, tmp_path: Path, damage: str) -> None:
    names(tmp_path)
    (file,) = (tmp_path / "vlmchat").iterdir()
    whole = file.read_bytes()
    file.write_text(damage)
    assert names(tmp_path) == expected
    assert json.loads(file.read_bytes()) == json.loads(whole)


def test_cache_that_cannot_be_written_is_done_without(expected: str, tmp_path: Path) -> None:
    (tmp_path / "vlmchat").write_text("a file where the folder would be")
    assert names(tmp_path) == expected
