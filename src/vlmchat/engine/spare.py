"""Import torch and transformers without compiler and distributed part, for a quick start.

Called before the first import of transformers. Half of the time that takes goes into modules that
one process which answers questions never uses: torch's compiler (and with it sympy), its exporter,
what its operators do on the meta device where C++ does not say it (`on_meta` wants that of some),
DTensor, FSDP. Nothing is taken away: each is imported whole at the first use of anything in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmchat.engine.import_structure import remember_import_structure

COMPILER = "torch._dynamo"
# All that transformers imports of it, and calls for masks that are computed by rules.
_WANTED = f"{COMPILER}._trace_wrapped_higher_order_op"
_NAME = "TransformGetItemToIndex"
# Marks that transformers puts on functions when it is imported, for a compiler that is not there.
_MARKS = ("disable", "assume_constant_result", "allow_in_graph")
# What torch imports at its end and does not use itself.
_EXPORTER = "torch.export"
_META = "torch._meta_registrations"
_PRIMS = "torch._prims"  # imported by the latter
# What must be whole before another is executed.
_BEFORE = {COMPILER: (_META, _WANTED), _EXPORTER: (_META,)}


class _Later(ModuleType):
    """A module that is executed when something in it is used that was not imported before."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        package = spec is not None and spec.submodule_search_locations is not None
        if spec is None or (name.startswith("__") and not (package and name == "__path__")):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _MARKS:
            return _unmarked
        if name == _NAME:
            return _wanted
        _execute(self)
        return getattr(self, name)


def _put_off(name: str) -> None:
    """Have a part of torch, where there is one of that name, executed later."""
    torch = importlib.util.find_spec("torch")
    folders = (torch.submodule_search_locations if torch else None) or []
    inner = name.split(".")[1:-1]
    spec = PathFinder.find_spec(name, [str(Path(folder, *inner)) for folder in folders])
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    vars(module).pop("__path__", None)  # asked for by whoever imports something in it
    module.__class__ = _Later
    sys.modules[name] = module


def _execute(module: ModuleType | None) -> None:
    """Make a module whole that was put off; others are."""
    if not isinstance(module, _Later):
        return
    spec = module.__spec__
    assert spec is not None
    assert spec.loader is not None
    module.__class__ = ModuleType  # type: ignore[assignment]
    if spec.submodule_search_locations is not None:
        module.__path__ = spec.submodule_search_locations
    for name in _BEFORE.get(spec.name, ()):
        _execute(sys.modules.get(name))
    spec.loader.exec_module(module)


def _wanted() -> Any:
    _execute(sys.modules[_WANTED])
    return getattr(sys.modules[_WANTED], _NAME)()


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return function if function is not None else _unmarked


def _import_torch() -> None:
    for name in (_EXPORTER, _META, _PRIMS):
        _put_off(name)
    importlib.import_module("torch")
    prims = sys.modules.get(_PRIMS)
    if isinstance(prims, _Later) and prims.__spec__ is not None:
        prims.__path__ = prims.__spec__.submodule_search_locations or []
        importlib.import_module(f"{_PRIMS}.rng_prims")  # without it there is no torch.Generator


def spare_imports() -> None:
    """Put off what takes long, and tell transformers that torch has no distributed part.

    Leaves alone what was imported before.
    """
    if "torch" not in sys.modules:
        _import_torch()
    import torch

    if COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        return
    _put_off(COMPILER)
    _put_off(_WANTED)
    torch._dynamo = sys.modules[COMPILER]
    remember_import_structure()
    from transformers.utils.import_utils import is_torch_distributed_available

    available, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        is_torch_distributed_available()  # transformers asks once, and keeps the answer
    finally:
        torch.distributed.is_available = available


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules whose parameters take no memory, as with `torch.device("meta")`.

    Nothing is drawn at random, and what is computed from `arange` (rotary frequencies, positions)
    is computed on the CPU: on the meta device torch does both in Python, and imports sympy for it.
    """
    import torch
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    fillers = (init.normal_, init.uniform_, init.kaiming_uniform_)

    class NothingDrawn(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            named = kwargs or {}
            if func in fillers:
                return named["tensor"] if "tensor" in named else args[0]
            if func is torch.arange:
                return func(*args, **{**named, "device": "cpu"})
            func = torch.empty if func is torch.randn else func
            try:
                return func(*args, **named)
            except NotImplementedError:
                if not isinstance(sys.modules.get(_META), _Later):
                    raise
                _execute(sys.modules[_META])
                return func(*args, **named)

    with torch.device("meta"), NothingDrawn():
        yield
