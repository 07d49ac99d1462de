"""Remember which of transformers' modules defines what, for a quick start.

Put in force by `spare`. When it is imported, transformers reads the sources of all its models,
twice, to learn the names in them. The sources of an installed version do not change, so what it
learnt is kept in the user's cache directory, by version and place.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs

_READER = "transformers.utils.import_utils"
_FUNCTION = "define_import_structure"
# What backends (torch, vision, …) are needed -> module -> the names that it defines.
Structure = dict[frozenset[str], dict[str, set[str]]]


def remember_import_structure() -> None:
    """Have transformers, which is still to be imported, ask us before it reads all its sources."""
    if _READER not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module, once, and changes one function in it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _READER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if hasattr(module, _FUNCTION):
                    setattr(module, _FUNCTION, _remembering(getattr(module, _FUNCTION)))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _remembering(read: Callable[..., Structure]) -> Callable[..., Structure]:
    def define_import_structure(module_path: Any, prefix: str | None = None) -> Structure:
        folder = Path(module_path)
        folder = folder.parent if folder.suffix else folder
        whole = (folder.name, folder.parent.name) == ("models", "transformers")
        if not whole or "dev" in version("transformers"):  # whose sources may change
            return read(module_path, prefix)
        file = _file(folder)
        structure = _kept(file)
        if structure is None:
            structure = read(str(folder), None)
            _keep(file, structure)
        start = f"{prefix}." if prefix else ""
        return {
            needed: {start + module: set(names) for module, names in defined.items()}
            for needed, defined in structure.items()
        }

    return define_import_structure


def _file(models: Path) -> Path:
    about = (version("transformers"), str(models), models.stat().st_mtime_ns)
    key = hashlib.sha256(repr(about).encode()).hexdigest()
    return platformdirs.user_cache_path("vlmchat") / f"transformers-{key[:16]}.json"


def _kept(file: Path) -> Structure | None:
    try:
        kept = json.loads(file.read_bytes())
        return {
            frozenset(needed): {module: set(names) for module, names in defined.items()}
            for needed, defined in kept
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # none yet, or not readable: the sources are


def _keep(file: Path, structure: Structure) -> None:
    kept = [
        [sorted(needed), {module: sorted(names) for module, names in defined.items()}]
        for needed, defined in structure.items()
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            fresh = Path(scratch) / file.name
            fresh.write_text(json.dumps(kept), encoding="utf-8")
            fresh.replace(file)  # whole, or not at all
    except OSError:
        pass  # read again the next time
