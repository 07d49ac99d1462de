"""A small run of the fuzzer: what is broken is read or refused, by a typed error."""

from __future__ import annotations

from tools.fuzz import fuzz, pictures, requests


def test_fuzz_pictures_are_read_or_refused_by_a_typed_error() -> None:
    tally = fuzz(pictures(), 1500)
    assert set(tally.outcomes) <= {"read", "image_rejected"}
    assert len(tally.outcomes) == 2


def test_fuzz_requests_are_read_or_refused_by_a_typed_error() -> None:
    tally = fuzz(requests(), 1500)
    assert set(tally.outcomes) <= {"read", "invalid_request", "unsupported_parameter"}
    assert len(tally.outcomes) == 3
