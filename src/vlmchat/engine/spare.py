"""Import torch and transformers without compiler and distributed part, for a quick start.

Called before the first import of transformers. Half of the time that takes goes into modules that
one process which answers questions never uses: torch's compiler (and with it sympy), DTensor, FSDP.
Nothing is taken away: the compiler is imported whole at the first use of anything in it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vlmchat.engine.import_structure import remember_import_structure

COMPILER = "torch._dynamo"
# All that transformers imports of it.
_WANTED = "_trace_wrapped_higher_order_op"
# Marks that transformers puts on functions when it is imported, for a compiler that is not there.
_MARKS = ("disable", "assume_constant_result", "allow_in_graph")


class _Later(ModuleType):
    """A package that is executed when something in it is used that was not imported before."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if spec is None or spec.loader is None or (name.startswith("__") and name != "__path__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _MARKS:
            return _unmarked
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations or []
        spec.loader.exec_module(self)
        return getattr(self, name)


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return function if function is not None else _unmarked


def spare_imports() -> None:
    """Put the compiler off, and tell transformers that torch has no distributed part.

    Does nothing where either was imported before.
    """
    import torch

    if COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        return
    spec = importlib.util.find_spec(COMPILER)
    if spec is None:
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Later
    sys.modules[COMPILER] = torch._dynamo = package
    importlib.import_module(f"{COMPILER}.{_WANTED}")
    del package.__path__

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
            return (torch.empty if func is torch.randn else func)(*args, **named)

    with torch.device("meta"), NothingDrawn():
        yield
