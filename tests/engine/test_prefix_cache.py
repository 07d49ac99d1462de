"""PrefixCache: which slot, how much of it."""

from __future__ import annotations

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
