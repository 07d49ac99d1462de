"""The benchmark of quantised answers measures what it says, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fidelity
from tests.tiny import make_tiny_llava


def test_fidelity_is_perfect_for_float32_and_worse_with_fewer_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fidelity, "NUM_PICTURES", 2)
    monkeypatch.setattr(fidelity, "NEW_TOKENS", 6)
    same = {"float32": ("float32", None, False)}
    monkeypatch.setattr(fidelity, "PRECISIONS", same | fidelity.PRECISIONS)
    model = str(make_tiny_llava(tmp_path / "tiny"))
    measured = {name: rest for name, *rest in fidelity.measure(model)}
    divergence, agreement, answers = measured["float32"]
    assert float(divergence.abs().max()) < 1e-6
    assert float(agreement.mean()) == 1
    assert answers == [True] * 8
    means = [float(measured[name][0].mean()) for name in ("float32", "int8", "int4")]
    assert means == sorted(means)
    assert means[1] > 1e-4
