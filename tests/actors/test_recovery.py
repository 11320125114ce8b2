"""Repair decisions: only the dead are replaced, patience is bounded."""

from __future__ import annotations

from itertools import count

from actors.recovery import MOST_TRIES, plan_repair, wait_before


def test_only_the_dead_are_replaced_in_a_new_epoch() -> None:
    repair = plan_repair(6, [True, False, True, False])
    assert (repair.epoch, repair.replace) == (7, (1, 3))


def test_a_cut_cable_with_everybody_alive_still_needs_a_new_epoch() -> None:
    repair = plan_repair(0, [True, True])
    assert (repair.epoch, repair.replace) == (1, ())


def test_the_first_try_is_immediate_and_the_last_is_not_far() -> None:
    waits = []
    for tries in count():
        wait_s = wait_before(tries)
        if wait_s is None:
            break
        waits.append(wait_s)
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert len(waits) == MOST_TRIES
    assert sum(waits) < 60
