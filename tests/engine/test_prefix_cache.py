"""PrefixCache: which slot, how much of it."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from vlmchat.engine.prefix_cache import Lease, PrefixCache


def test_prefix_cache_finds_the_longest_common_prefix() -> None:
    cache = PrefixCache(2)
    slots = [cache.acquire([0]), cache.acquire([0])]
    for lease, tokens in zip(slots, ([1, 2, 3, 4], [1, 2, 9, 9]), strict=True):
        assert lease is not None
        cache.release(lease.slot, tokens)
    assert cache.acquire([1, 2, 9, 8, 7]) == Lease(slot=1, num_cached=3)


def test_prefix_cache_leaves_the_last_token_to_compute() -> None:
    cache = PrefixCache(1)
    cache.acquire([1, 2, 3])
    cache.release(0, [1, 2, 3])
    assert cache.acquire([1, 2, 3]) == Lease(slot=0, num_cached=2)


def test_prefix_cache_takes_the_least_recently_used_slot_when_none_matches() -> None:
    cache = PrefixCache(3)
    for _ in range(3):
        cache.acquire([0])
    for slot in (1, 0, 2):
        cache.release(slot, [slot + 1, 0])
    assert cache.acquire([9, 9]) == Lease(slot=1, num_cached=0)


def test_prefix_cache_has_nothing_when_all_slots_are_busy() -> None:
    cache = PrefixCache(1)
    cache.acquire([1, 2])
    assert cache.acquire([3, 4]) is None


def test_prefix_cache_forgets_what_an_aborted_slot_held() -> None:
    cache = PrefixCache(1)
    cache.acquire([1, 2, 3])
    cache.release(0, ())
    assert cache.acquire([1, 2, 3]) == Lease(slot=0, num_cached=0)


def filled(*held: list[int]) -> PrefixCache:
    """A slot for each, all free, used in this order."""
    cache = PrefixCache(len(held))
    for tokens in held:
        cache.release(held.index(tokens), tokens)
    return cache


LONG = list(range(100))


def test_prefix_cache_copies_from_a_busy_slot_what_it_has_computed() -> None:
    cache = PrefixCache(2)
    cache.acquire(LONG)
    cache.computed(0, 60)
    assert cache.acquire([*LONG, 1]) == Lease(slot=1, num_cached=60, copy_from=0)


def test_prefix_cache_takes_a_free_slot_over_rather_than_copy_little_more() -> None:
    cache = filled(LONG[:50], [7] * 80)
    lease = cache.acquire([7] * 80 + [8])
    assert lease == Lease(slot=1, num_cached=80)
    cache.computed(1, 81)
    assert cache.acquire([*LONG[:50], 3]) == Lease(slot=0, num_cached=50)


def test_prefix_cache_copies_where_taking_over_would_destroy_more_than_is_shared() -> None:
    cache = filled([5] * 10, LONG)
    assert cache.acquire([*LONG[:30], -1, -2]) == Lease(slot=0, num_cached=30, copy_from=1)
    cache.release(0, ())
    assert cache.acquire([*LONG, 1]) == Lease(slot=1, num_cached=100)


def test_prefix_cache_takes_over_where_less_is_destroyed_than_shared() -> None:
    cache = filled([5] * 10, LONG)
    assert cache.acquire([*LONG[:60], -1, -2]) == Lease(slot=1, num_cached=60)


def test_prefix_cache_shares_no_more_than_the_cut_allows() -> None:
    cache = filled(LONG)
    assert cache.acquire([*LONG, 1], lambda length: min(length, 42)) == Lease(0, 42)


def test_prefix_cache_counts_what_is_on_loan() -> None:
    cache = PrefixCache(3)
    cache.acquire([1])
    assert (cache.num_busy, cache.num_slots) == (1, 3)


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_prefix_cache_finds_the_prefix_that_a_plain_comparison_finds(
    a: list[int], b: list[int]
) -> None:
    lease = filled(a).acquire([*b, 9])
    pairs = zip(a, b, strict=False)
    expected = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    assert lease == Lease(0, expected)
