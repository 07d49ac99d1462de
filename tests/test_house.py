"""The rules of the house: who imports whom, what is documented, what docs say of the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import docs
from vlmchat import errors
from vlmchat.commands.exit import OTHER_EXITS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vlmchat"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]

# A module may import those of lower rank, and its own folder. Longest prefix wins.
RANKS = {
    "__init__": 0,
    "errors": 0,
    "conversation": 1,
    "request": 2,
    "config": 3,
    "": 4,  # everything that is not named here: images, fetch, output, session, store …
    "engine": 5,
    "repl": 6,
    "commands": 7,
    "__main__": 8,
}
TORCH_ROOMS = (
    "assemble",
    "hf_checkpoint",
    "kv_cache",
    "llava_checkpoint",
    "llava_model",
    "llava_weights",
    "loader",
    "lora",
    "memory",
    "quantize",
    "runner",
    "sampler",
    "tensors",
    "vision",
)
STRANGERS_TO_THE_ENGINE = ("server", "repl", "web", "session", "output", "store", "client")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(node: ast.AST) -> Iterator[str]:
    """Absolute names imported anywhere below `node`, those for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imports(child)


def _room(name: str) -> str:
    """`engine/runner.py` or `vlmchat.engine.runner` -> `engine.runner`."""
    return name.removesuffix(".py").replace("/", ".").removeprefix("vlmchat.")


def _rank(room: str) -> int:
    found = [name for name in RANKS if name and (room == name or room.startswith(f"{name}."))]
    return RANKS[max(found, key=len, default="")]


def _in_package(path: Path) -> list[str]:
    files = {_room(name).removesuffix(".__init__") for name in NAMES}
    named = (_room(name) for name in _imports(_tree(path)) if name.startswith("vlmchat."))
    return [name for name in named if name in files]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_module_imports_only_what_stands_below_it(path: Path) -> None:
    room = _room(str(path.relative_to(PACKAGE)))
    above = [name for name in _in_package(path) if _rank(name) > _rank(room)]
    assert above == []


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_module_leaves_the_engine_alone_when_any_backend_would_do(path: Path) -> None:
    room = _room(str(path.relative_to(PACKAGE)))
    if room.split(".")[0].split("_")[0] in STRANGERS_TO_THE_ENGINE:
        assert [name for name in _in_package(path) if name.startswith("engine")] == []


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_module_imports_torch_only_in_its_rooms(path: Path) -> None:
    room = _room(str(path.relative_to(PACKAGE)))
    if room not in [f"engine.{name}" for name in TORCH_ROOMS]:
        heavy = [n for n in _imports(_tree(path)) if n.split(".")[0] == "torch"]
        assert heavy == []


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_module_reads_the_environment_only_in_commands(path: Path) -> None:
    if not path.is_relative_to(PACKAGE / "commands"):
        text = ast.unparse(_tree(path))
        assert "os.environ" not in text
        assert "getenv" not in text


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_module_and_its_public_functions_have_docstrings(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree)
    assert list(_undocumented(tree)) == []


def _undocumented(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Public functions, classes and methods without a docstring, but for those of `...` only."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        if ast.unparse(child.body[0]) == "...":
            continue
        if not ast.get_docstring(child):
            yield child.name
        if isinstance(child, ast.ClassDef):
            yield from _undocumented(child)


@pytest.mark.parametrize("path", sorted(docs.pages()), ids=lambda path: path.name)
def test_page_made_from_the_code_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == docs.pages()[path], "run `make docs`"


def test_error_codes_are_unique() -> None:
    codes = [kind.code for kind in docs.error_classes()] + list(OTHER_EXITS)
    assert len(set(codes)) == len(codes)


def test_error_tree_in_the_docstring_names_every_class() -> None:
    assert errors.__doc__ is not None
    assert [k.__name__ for k in docs.error_classes() if k.__name__ not in errors.__doc__] == []
