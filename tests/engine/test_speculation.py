"""Prompt lookup: what it guesses, when it stays quiet."""

from __future__ import annotations

from vlmchat.engine.speculation import MAX_DRAFT, PromptLookup, RowCost

CHEAP, DEAR = RowCost(0.01), RowCost(1.0)


def seen(text: str) -> PromptLookup:
    return PromptLookup(map(ord, text))


def guess(text: str, most: int = 4, cost: RowCost = CHEAP) -> str:
    return "".join(map(chr, seen(text).draft(most, cost)))


def test_prompt_lookup_guesses_what_followed_the_longest_match() -> None:
    assert guess("12a4 99a5 12a", 1) == "4"


def test_prompt_lookup_prefers_what_followed_last() -> None:
    assert guess("the cat. the dog. the ") == "dog."


def test_prompt_lookup_goes_round_where_a_text_repeats_itself() -> None:
    assert guess("xababab", 8) == "abababab"


def test_prompt_lookup_guesses_nothing_for_what_was_never_seen() -> None:
    assert guess("abcdef") == ""


def test_prompt_lookup_guesses_no_more_than_it_may() -> None:
    assert guess("abcabcabc", 2) == "ab"
    assert guess("abcabcabc", 0) == ""
    assert len(guess("abcabcabc", 99)) == MAX_DRAFT


def test_prompt_lookup_never_guesses_a_picture() -> None:
    lookup = PromptLookup([1, 2, 3, -9, -9, 1, 2, 3])
    assert lookup.draft(4, CHEAP) == ()


def test_prompt_lookup_stays_quiet_where_a_longer_row_costs_as_much_as_it_could_gain() -> None:
    assert guess("abcabcabc", cost=DEAR) == ""


def test_prompt_lookup_learns_from_guesses_it_does_not_make() -> None:
    lookup, costly = seen("ab"), RowCost(0.5)
    quiet = [lookup.draft(4, costly)]
    for token in "ab" * 10:
        lookup.append(ord(token))
        quiet.append(lookup.draft(4, costly))
    assert quiet[0] == ()
    assert quiet[-1] != ()


def test_prompt_lookup_stops_where_its_guesses_are_wrong() -> None:
    lookup, cost = seen("abcd" * 3), RowCost(0.3)
    assert lookup.draft(4, cost)
    for token in "abcx" * 3 + "abcy" * 3 + "abcz" * 3:  # a cycle that is left again and again
        lookup.append(ord(token))
        if draft := lookup.draft(4, cost):
            lookup.judge(draft, 0)
    assert len(lookup.draft(4, cost)) < 4


def test_row_cost_follows_what_is_measured() -> None:
    cost = RowCost()
    for _ in range(50):
        cost.note(1, 0.010)
        cost.note(5, 0.030)
    assert 2.5 < cost.of(5) < 3.1
    assert cost.of(1) == 1
