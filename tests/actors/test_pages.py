"""Page bookkeeping: nothing is lost, nothing is owned twice, whatever the order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.pages import PagePool, PagePools, pages_for
from sharding.batch import PAGE_SLOTS


def test_pages_for_rounds_up_to_whole_pages() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE_SLOTS, PAGE_SLOTS + 1)] == [0, 1, 1, 2]


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    pool = PagePool(4)
    assert pool.reserve(1, 3 * PAGE_SLOTS) is not None
    assert pool.reserve(2, 2 * PAGE_SLOTS) is None
    assert pool.free == 1
    pool.check_integrity()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 90)), max_size=40))
def test_books_balance_after_any_sequence(events: list[tuple[int, int]]) -> None:
    """Each event reserves for a request, or releases it if it owns pages already."""
    pool = PagePool(12)
    owned: dict[int, list[int]] = {}
    for request, tokens in events:
        if request in owned:
            pool.release(request)
            del owned[request]
        elif (pages := pool.reserve(request, tokens)) is not None:
            assert len(pages) == pages_for(tokens)
            owned[request] = pages
        pool.check_integrity()
    everything = [page for pages in owned.values() for page in pages]
    assert len(everything) == len(set(everything)) == pool.pages - pool.free


def test_a_request_takes_no_more_window_pages_than_a_ring() -> None:
    pools = PagePools(12, window_pages=5, ring=3)
    long = pools.reserve(1, 8 * PAGE_SLOTS)
    assert long is not None and (len(long.pages), len(long.window_pages)) == (8, 3)
    assert pools.fit([2 * PAGE_SLOTS]) and not pools.fit([3 * PAGE_SLOTS])
    assert pools.reserve(2, 3 * PAGE_SLOTS) is None  # four pages are free, but two for windows
    short = pools.reserve(3, 2 * PAGE_SLOTS)
    assert short is not None and not set(short.window_pages) & set(long.window_pages)
    assert (pools.free, pools.idle) == (2, False)
    pools.check_integrity()
    pools.release(1)
    pools.release(3)
    assert pools.idle
