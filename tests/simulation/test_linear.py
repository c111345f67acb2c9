"""The checker of orders itself: it accepts what can have happened, and names what cannot."""

from __future__ import annotations

import pytest

from tests.simulation.linear import NotLinear, Order, Seen, check

# Positions 1, 2 and 3, written one by one at the instants 10, 20 and 30.
THREE = [(1, 10), (1, 20), (1, 30)]


def change(name: str, invoked: int, returned: int, made: int) -> Seen:
    return Seen(name, invoked, returned, [(made, made)], made=made)


def read(name: str, invoked: int, returned: int, *true_at: tuple[int, int]) -> Seen:
    return Seen(name, invoked, returned, list(true_at), is_read=True)


def refused(name: str, invoked: int, returned: int, *true_at: tuple[int, int]) -> Seen:
    return Seen(name, invoked, returned, list(true_at))


def test_calls_one_after_another_are_in_order() -> None:
    check(
        THREE,
        [
            change("a", 5, 11, 1),
            read("sees a", 12, 13, (1, 1)),
            change("b", 15, 21, 2),
            refused("stale", 22, 23, (2, 2)),
            change("c", 25, 31, 3),
        ],
    )


def test_calls_at_the_same_time_may_be_in_either_order() -> None:
    check(THREE, [change("a", 5, 40, 2), change("b", 6, 41, 1), change("c", 7, 42, 3)])


def test_a_read_beside_a_change_may_see_it_or_not() -> None:
    check(THREE, [read("before", 15, 25, (1, 1)), change("b", 15, 26, 2)])
    check(THREE, [read("after", 15, 25, (2, 2)), change("b", 15, 26, 2)])


def test_an_applied_change_that_is_not_in_the_history_is_a_lost_update() -> None:
    with pytest.raises(NotLinear, match="lost update"):
        check(THREE, [change("a", 31, 40, 4)])


def test_two_calls_cannot_have_made_the_same_revision() -> None:
    with pytest.raises(NotLinear, match="as well"):
        check(THREE, [change("a", 15, 25, 2), change("b", 16, 26, 2)])


def test_a_read_that_misses_an_acknowledged_change_is_stale() -> None:
    with pytest.raises(NotLinear, match="stale"):
        check(THREE, [change("b", 15, 21, 2), read("old", 22, 23, (1, 1))])


def test_a_read_that_misses_what_another_read_has_shown_is_stale() -> None:
    with pytest.raises(NotLinear, match="stale"):
        check(THREE, [read("new", 21, 22, (2, 2)), read("old", 23, 24, (1, 1))])


def test_a_refusal_that_was_never_true_is_found() -> None:
    with pytest.raises(NotLinear, match="never true"):
        check(THREE, [refused("liar", 12, 13)])


def test_a_refusal_that_was_true_only_before_the_call_is_found() -> None:
    with pytest.raises(NotLinear, match="stale"):
        check(THREE, [change("b", 15, 21, 2), refused("late", 22, 23, (0, 1))])


def test_a_refusal_that_becomes_true_only_after_the_answer_is_found() -> None:
    with pytest.raises(NotLinear, match="after the answer"):
        check(THREE, [refused("early", 12, 13, (2, 3))])


def test_a_change_acknowledged_before_another_began_cannot_come_after_it() -> None:
    with pytest.raises(NotLinear, match="acknowledged before"):
        check([(1, 10), (1, 10)], [change("first", 5, 11, 2), change("second", 12, 20, 1)])


def test_a_change_answered_before_it_was_durable_is_found() -> None:
    with pytest.raises(NotLinear, match="was written at 20"):
        check(THREE, [change("hasty", 15, 19, 2)])


def test_a_change_written_before_it_was_asked_for_is_found() -> None:
    with pytest.raises(NotLinear, match="was written at 10"):
        check(THREE, [change("prophet", 15, 19, 1)])


def test_a_read_of_what_is_not_durable_yet_is_found() -> None:
    with pytest.raises(NotLinear, match="after the answer"):
        check(THREE, [read("dirty", 12, 15, (2, 2))])


def test_a_read_of_half_a_commit_is_found() -> None:
    check([(2, 10)], [refused("inside the turn", 5, 11, (1, 1))])

    with pytest.raises(NotLinear, match="stale"):
        check([(2, 10)], [read("half", 5, 11, (1, 1))])


def test_what_a_power_cut_takes_is_a_suffix_and_is_named() -> None:
    order = Order()
    for events, tick in THREE:
        order.commit(events, tick)
    order.take(change("b", 15, 21, 2))
    order.take(change("c", 25, 31, 3))

    lost = order.cut(1)

    assert lost == ["b", "c"]
    order.commit(1, 40)
    order.take(change("b again", 35, 41, 2))
    order.take(read("sees it", 42, 43, (2, 2)))
