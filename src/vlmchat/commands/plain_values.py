"""Texts, numbers and defaults taken as they are, where Typer would import pydantic to check them.

That takes 0.07 s of every start. What is not plainly right is left to Typer, and so are its words
about it; a Typer without pydantic checks everything itself.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

_NUMBERS = {int: r"-?\d{1,18}", float: r"-?\d{1,18}(\.\d{1,18})?"}


class PlainGroup(TyperGroup):
    """A group of commands whose own parameters take plain values unchecked."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As Typer's."""
        return _taking_plain_values(super().get_params(ctx))


class PlainCommand(TyperCommand):
    """A command whose parameters take plain values unchecked."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As Typer's."""
        return _taking_plain_values(super().get_params(ctx))


def _taking_plain_values(params: list[Any]) -> list[Any]:
    for param in params:
        descriptor = getattr(param, "type_descriptor", None)
        known = "process_value" in vars(param)
        if not known and descriptor is not None and descriptor.parameter_info.parser is None:
            _take_plain_values(param, descriptor)
    return params


def _take_plain_values(param: Any, descriptor: Any) -> None:
    check = param.process_value

    def process_value(ctx: Any, value: Any) -> Any:
        source = ctx.get_parameter_source(param.name)
        is_default = getattr(source, "name", "") == "DEFAULT" and not param.multiple
        try:
            plain = value if is_default else _plain(descriptor, value)
        except ValueError:
            return check(ctx, value)
        if param.required and param.value_is_missing(plain):
            return check(ctx, value)
        return param.callback(ctx, param, plain) if param.callback else plain

    param.process_value = process_value


def _plain(descriptor: Any, value: Any) -> Any:
    """The value in its type; raises ValueError where that takes more than a look."""
    kind, info = descriptor.annotation, descriptor.parameter_info
    if value is None:
        return () if descriptor.is_list else None
    if kind == list[str] and isinstance(value, list | tuple):
        if all(isinstance(item, str) for item in value):
            return list(value)
    elif kind is str and isinstance(value, str):
        return value
    elif kind in _NUMBERS and isinstance(value, str) and re.fullmatch(_NUMBERS[kind], value, re.A):
        number = kind(value)
        if (info.min is None or info.min <= number) and (info.max is None or number <= info.max):
            return number
    raise ValueError(value)
