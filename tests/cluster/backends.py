"""Loaders for replicas: importable there, no torch."""

from __future__ import annotations

from tests.fakes import ScriptedBackend


def echo(delay_s: float) -> ScriptedBackend:
    """Says each question again, a word every `delay_s`."""
    return ScriptedBackend(delay_s=delay_s, model="echo")
