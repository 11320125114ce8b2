"""Rings of pages of layers with a window: how many a request takes, and who may go on in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from actors.windows import PagePools
from sharding.batch import PAGE_SLOTS
from tests.actors.test_pages import keys_of


class Reserved(NamedTuple):
    """What a request got."""

    filled: int
    pages: list[int]
    window_pages: list[int]


def reserve(
    pools: PagePools, request: int, tokens: int, keys: Sequence[bytes] = ()
) -> Reserved | None:
    """Pages for a request that begins with these keys."""
    filled = pools.reserve(request, tokens, keys, len(keys))
    return None if filled is None else Reserved(filled, *pools.pages_of(request))


def test_a_request_takes_no_more_window_pages_than_a_ring() -> None:
    pools = PagePools(12, window_pages=5, ring=3)
    long = reserve(pools, 1, 8 * PAGE_SLOTS)
    assert long is not None and (len(long.pages), len(long.window_pages)) == (8, 3)
    assert pools.fit([2 * PAGE_SLOTS]) and not pools.fit([3 * PAGE_SLOTS])
    assert reserve(pools, 2, 3 * PAGE_SLOTS) is None  # four pages are free, but two for windows
    short = reserve(pools, 3, 2 * PAGE_SLOTS)
    assert short is not None and not set(short.window_pages) & set(long.window_pages)
    assert (pools.free, pools.idle) == (2, False)
    pools.check_integrity()
    pools.release(1)
    pools.release(3)
    assert pools.idle


def leave(pools: PagePools, request: int, keys: list[bytes], written: int) -> list[int]:
    """A request with these full pages that ends after so many tokens; its ring."""
    reserved = reserve(pools, request, max(written, len(keys) * PAGE_SLOTS))
    assert reserved is not None
    for index, key in enumerate(keys):
        pools.keep(request, index, key)
    pools.release(request, keys, written)
    pools.check_integrity()
    return reserved.window_pages


@pytest.mark.parametrize(
    ("common", "window", "filled"),
    [(8, 32, 8), (7, 32, 7), (6, 32, 6), (5, 32, 0), (6, 33, 6), (5, 18, 0), (5, 17, 5)],
)
def test_a_request_goes_on_in_the_ring_of_one_that_began_alike(
    common: int, window: int, filled: int
) -> None:
    """A ring of 4 pages: after 8 pages it holds pages 4 to 7. Who goes on behind `common` pages
    with a window of 32 sees the last two of them; of 17 one whole, of 18 one slot more."""
    pools = PagePools(40, window_pages=8, ring=4, window=window)
    keys = keys_of(*range(8))
    ring = leave(pools, 1, keys, 8 * PAGE_SLOTS)
    branch = keys_of(*range(common), 99, 98)
    reserved = reserve(pools, 2, 12 * PAGE_SLOTS, branch)
    assert reserved is not None and reserved.filled == filled
    assert (reserved.window_pages == ring) == bool(filled)
    pools.check_integrity()


def test_what_was_in_flight_when_a_request_ended_is_counted_as_written() -> None:
    """Its last page was never finished, but began to overwrite page 4."""
    pools = PagePools(40, window_pages=4, ring=4, window=2 * PAGE_SLOTS)
    keys = keys_of(*range(8))
    leave(pools, 1, keys, 8 * PAGE_SLOTS + 1)
    reserved = reserve(pools, 2, 12 * PAGE_SLOTS, keys[:6])
    assert reserved is not None and reserved.filled == 0


def test_a_ring_is_for_one_request_only() -> None:
    pools = PagePools(40, window_pages=8, ring=4, window=PAGE_SLOTS)
    keys = keys_of(1, 2, 3)
    leave(pools, 1, keys, 3 * PAGE_SLOTS)
    found = [reserve(pools, request, 5 * PAGE_SLOTS, keys) for request in (2, 3)]
    assert [each and each.filled for each in found] == [3, 0]
    pools.check_integrity()


@pytest.mark.parametrize("tokens", [2 * PAGE_SLOTS, 3 * PAGE_SLOTS, 9 * PAGE_SLOTS])
def test_a_ring_grows_and_shrinks_to_what_its_next_request_needs(tokens: int) -> None:
    pools = PagePools(40, window_pages=9, ring=4, window=PAGE_SLOTS)
    keys = keys_of(1, 2)
    ring = leave(pools, 1, keys, 3 * PAGE_SLOTS)
    reserved = reserve(pools, 2, tokens, keys[:1])
    assert reserved is not None and reserved.filled == 1
    assert len(reserved.window_pages) == min(4, tokens // PAGE_SLOTS)
    common = min(len(ring), len(reserved.window_pages))
    assert reserved.window_pages[:common] == ring[:common]
    pools.check_integrity()


def test_rings_make_room_for_who_needs_their_pages() -> None:
    pools = PagePools(60, window_pages=8, ring=4, window=PAGE_SLOTS)
    older, newer = keys_of(*range(6)), keys_of(*range(10, 16))
    leave(pools, 1, older, 6 * PAGE_SLOTS)
    leave(pools, 2, newer, 6 * PAGE_SLOTS)
    assert pools.window_free == 8
    assert reserve(pools, 3, 6 * PAGE_SLOTS) is not None
    pools.check_integrity()
    reserved = reserve(pools, 4, 7 * PAGE_SLOTS, newer)
    assert reserved is not None and reserved.filled == 6, "the older ring went"


def test_no_ring_is_found_once_the_kv_is_gone() -> None:
    pools = PagePools(40, window_pages=8, ring=4, window=PAGE_SLOTS)
    keys = keys_of(1, 2)
    leave(pools, 1, keys, 2 * PAGE_SLOTS)
    pools.forget()
    pools.check_integrity()
    assert pools.idle
    other = reserve(pools, 2, 3 * PAGE_SLOTS, keys)
    assert other is not None and other.filled == 0
    for index, key in enumerate(keys):
        pools.keep(2, index, key)  # the same text anew: its pages are there, the ring is not
    third = reserve(pools, 3, 3 * PAGE_SLOTS, keys)
    assert third is not None and third.filled == 0


def test_a_ring_keeps_what_its_owner_before_wrote_over() -> None:
    """The second one writes less than the first: what it does not reach is the first one's end,
    not what came a turn before."""
    pools = PagePools(40, window_pages=4, ring=4, window=2 * PAGE_SLOTS)
    keys = keys_of(*range(8))
    leave(pools, 1, keys, 8 * PAGE_SLOTS)
    again = reserve(pools, 2, 7 * PAGE_SLOTS, keys[:6])
    assert again is not None and again.filled == 6
    pools.release(2, keys[:6], 6 * PAGE_SLOTS + 4)
    third = reserve(pools, 3, 7 * PAGE_SLOTS, keys[:5])
    assert third is not None and third.filled == 0, "page 3 is gone since the first request"
