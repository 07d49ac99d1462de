"""The rules of the house: who imports whom, what is documented, what docs say of the code."""

from __future__ import annotations

import ast
import re
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

# The rooms of docs/architecture.md, in its order: a module imports only what comes before it.
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = [
    room.removesuffix(".py").removesuffix("/").replace("/", ".")
    for row in re.findall(r"^\| (`.+?) \|", ARCHITECTURE, re.M)
    for room in re.findall(r"`(\S+)`", row)
]
VALUES = ("errors", "conversation", "request", "queued_stream", "config")
TORCH_ROOMS = (
    *("runner", "vision", "sampler", "loader", "memory", "quantize", "assemble", "tensors"),
    *("hf_checkpoint", "lora", "llava_checkpoint", "llava_model", "llava_weights"),
    *("machine", "random_model", "spare", "capacity"),
    *("packed", "fused", "prequantized", "borrowed"),
    *(
        "kv_cache",
        "operators",
        "lean",
        "native_operators",
        "native_step",
        "cuda_graphs",
        "static_runner",
        "parallel",
    ),
    "grammar",
)


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
    """Where the module, or the folder that it is in, stands in ROOMS."""
    return next(rank for rank, name in enumerate(ROOMS) if f"{room}.".startswith(f"{name}."))


def _in_package(path: Path) -> list[str]:
    """The modules of this package that are imported, as in ROOMS."""
    files = {_room(name) for name in NAMES}
    named = (_room(name) for name in _imports(_tree(path)) if name.startswith("vlmchat."))
    return [name for name in named if name in files]


def test_architecture_names_every_room_and_no_other() -> None:
    files = {_room(name) for name in NAMES if not name.endswith("__init__.py")}
    folders = {room for room in ROOMS if (PACKAGE / room).is_dir()}
    in_folders = {file for file in files if file.split(".")[0] in folders}
    assert sorted(ROOMS) == sorted((files - in_folders) | folders)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__init__.py")])
def test_module_imports_only_what_stands_before_it(name: str) -> None:
    rank = _rank(_room(name))
    assert [found for found in _in_package(PACKAGE / name) if _rank(found) > rank] == []


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_engine_and_those_who_ask_it_do_not_know_each_other(path: Path) -> None:
    wing = path.relative_to(PACKAGE).parts[0]
    imports = _in_package(path)
    if wing == "engine":
        assert [n for n in imports if n not in VALUES and not n.startswith("engine.")] == []
    elif wing != "commands":
        assert [n for n in imports if n.startswith("engine.")] == []


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
