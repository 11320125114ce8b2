"""Page bookkeeping: nothing is lost, nothing is owned twice, whatever the order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.pages import PageKeys, PagePool, pages_for
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


def keys_of(*pages: int, salt: str = "") -> list[bytes]:
    """Keys of pages each of which is full of one token."""
    names = PageKeys(salt)
    for token in pages:
        names.extend([token] * PAGE_SLOTS)
    return names.keys


def found(pool: PagePool, keys: list[bytes]) -> int:
    """How many of the keys have a page, from the first on."""
    return pool.find(keys, len(keys))


def test_a_key_stands_for_all_tokens_up_to_its_page() -> None:
    assert keys_of(1, 2)[:1] == keys_of(1, 3)[:1] == keys_of(1)
    assert len({keys_of(1, 2)[1], keys_of(3, 2)[1], keys_of(1, 3)[1], keys_of(2)[0]}) == 4
    assert not set(keys_of(1, 2)) & set(keys_of(1, 2, salt="another user"))


def test_keys_are_the_same_however_the_tokens_came() -> None:
    tokens = list(range(3 * PAGE_SLOTS + 5))
    whole, parts = PageKeys(), PageKeys()
    whole.extend(tokens)
    parts.extend(tokens[: 2 * PAGE_SLOTS])
    parts.extend(tokens[2 * PAGE_SLOTS :])
    assert whole.keys == parts.keys and len(whole.keys) == 3


def test_a_full_page_is_found_after_its_request() -> None:
    pool, keys = PagePool(4), keys_of(1, 2)
    pages = pool.reserve(1, 2 * PAGE_SLOTS)
    assert pages is not None and found(pool, keys) == 0
    pool.keep(1, 0, keys[0])
    assert found(pool, keys) == 1, "the second page is not full yet"
    pool.release(1)
    assert (pool.free, pool.kept) == (4, 1)
    again = pool.reserve(2, 2 * PAGE_SLOTS, keys[:1])
    assert again is not None and again[0] == pages[0]
    assert (pool.free, pool.kept) == (2, 0)
    pool.check_integrity()


def test_two_requests_use_a_page_until_both_have_ended() -> None:
    pool, keys = PagePool(3), keys_of(1)
    pool.reserve(1, 2 * PAGE_SLOTS)
    pool.keep(1, 0, keys[0])
    assert pool.reserve(2, 2 * PAGE_SLOTS, keys) is not None, "one page is enough for what is new"
    assert pool.free == 0
    pool.release(1)
    pool.check_integrity()
    assert (pool.free, pool.kept) == (1, 0)
    pool.release(2)
    assert (pool.free, pool.kept) == (3, 1)


def test_pages_left_longest_ago_are_written_anew_first() -> None:
    pool, old, new = PagePool(4), keys_of(1, 2), keys_of(3, 4)
    for request, keys in ((1, old), (2, new)):
        pool.reserve(request, 2 * PAGE_SLOTS)
        for index, key in enumerate(keys):
            pool.keep(request, index, key)
        pool.release(request)
    assert pool.reserve(3, PAGE_SLOTS) is not None
    assert (found(pool, old), found(pool, new)) == (1, 2)
    assert pool.reserve(4, 2 * PAGE_SLOTS) is not None
    assert (found(pool, old), found(pool, new)) == (0, 1)
    pool.check_integrity()


def test_what_a_request_finds_is_not_also_counted_as_free_for_it() -> None:
    pool, keys = PagePool(3), keys_of(1, 2)
    pool.reserve(1, 2 * PAGE_SLOTS)
    for index, key in enumerate(keys):
        pool.keep(1, index, key)
    pool.release(1)
    assert pool.reserve(2, 4 * PAGE_SLOTS, keys) is None
    assert (pool.free, found(pool, keys)) == (3, 2), "nothing was taken"
    assert pool.reserve(2, 3 * PAGE_SLOTS, keys) is not None
    pool.check_integrity()


def test_a_page_takes_over_from_a_twin_that_nobody_uses() -> None:
    """Else the older one's end would take what follows the younger one with it."""
    pool, keys = PagePool(4), keys_of(1, 2)
    for request in (1, 2):
        pool.reserve(request, 2 * PAGE_SLOTS)
    pool.keep(1, 0, keys[0])
    pool.release(1)
    for index, key in enumerate(keys):
        pool.keep(2, index, key)
    pool.check_integrity()
    assert pool.reserve(3, 2 * PAGE_SLOTS) is not None, "the older twin is blank"
    assert found(pool, keys) == 2
    pool.check_integrity()


def test_what_only_a_faulty_request_holds_is_not_found() -> None:
    pool, keys = PagePool(4), keys_of(1, 2)
    pool.reserve(1, 2 * PAGE_SLOTS)
    for index, key in enumerate(keys):
        pool.keep(1, index, key)
    pool.reserve(2, 2 * PAGE_SLOTS, keys[:1])
    pool.distrust(1)
    pool.release(1)
    assert found(pool, keys) == 1, "another one still uses the first"
    pool.distrust(2)
    pool.release(2)
    assert (found(pool, keys), pool.kept) == (0, 0)
    pool.check_integrity()


def test_a_search_goes_on_where_it_was_if_that_is_still_there() -> None:
    pool, keys = PagePool(3), keys_of(1, 2, 3)
    pool.reserve(1, 3 * PAGE_SLOTS)
    for index in (0, 1):
        pool.keep(1, index, keys[index])
    assert pool.find(keys, 3) == 2
    pool.keep(1, 2, keys[2])
    assert pool.find(keys, 3, start=2) == 3
    pool.forget()
    assert pool.find(keys, 3, start=3) == 0


def test_no_salt_is_the_beginning_of_a_text() -> None:
    """Whoever chooses a salt must not get at another's KV by it."""
    names = PageKeys("\0" * 32)
    names.extend([5] * PAGE_SLOTS)
    assert names.keys[0] not in keys_of(0, 5)


def test_nothing_is_found_once_the_kv_is_gone() -> None:
    pool, keys = PagePool(3), keys_of(1, 2)
    pool.reserve(1, 2 * PAGE_SLOTS)
    pool.keep(1, 0, keys[0])
    pool.forget()
    pool.keep(1, 1, keys[1])
    pool.release(1)
    assert found(pool, keys) == 0 and pool.free == 3
    pool.check_integrity()
