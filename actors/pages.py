"""Page bookkeeping: which KV pages are free, which requests use the others, and of which tokens a
full page holds the KV. Pure, no tensors.

One pool serves all stages: page p of a request is page p on every stage, each for its own layers.
So one allocation reserves everywhere, and one release frees everywhere. Reuse before the last batch
in flight has run is safe: every stage takes batches in order, so a new owner's writes come after
the old owner's.

A full page keeps its KV when its request ends, under a key that stands for every token up to its
end. A request that begins with the same tokens uses that page too, and only reads it. While nobody
uses it, it counts as free: when no blank page is left, the one that was left longest ago is
written anew.

Models some of whose layers have a window have a second pool for those (`windows.py`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from sharding.batch import PAGE_SLOTS

_KEY_BYTES = 32  # so many that nobody finds two texts of one key: KV must not leak between users


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_SLOTS)


class PageKeys:
    """The keys of a request's full pages, in order: each is a hash of all tokens up to the page's
    end, so that equal keys mean equal KV."""

    def __init__(self, salt: str = "") -> None:
        """Requests of different `salt` share nothing."""
        self.keys: list[bytes] = []
        # Of another kind than pages' keys: no salt can pass for the beginning of a text.
        seed = salt.encode(errors="surrogatepass")
        self._last = blake2b(seed, digest_size=_KEY_BYTES, person=b"salt").digest()

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the tokens that follow; the last of them that fill no page are left out."""
        data = array("q", tokens).tobytes()
        size = PAGE_SLOTS * array("q").itemsize
        for start in range(0, len(data) - size + 1, size):
            page = data[start : start + size]
            self._last = blake2b(self._last + page, digest_size=_KEY_BYTES).digest()
            self.keys.append(self._last)


class PagePool:
    """Owner of the page numbers `[0, pages)`."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._blank = list(range(pages - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # with a key; left longest ago first
        self._owned: dict[int, list[int]] = {}
        self._users: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.version = 0
        """Grows when more is free, or when more can be found."""
        self.freed = 0
        """Grows when more is free."""

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._blank) + len(self._unused)

    @property
    def kept(self) -> int:
        """Of these, the pages whose KV is kept."""
        return len(self._unused)

    def find(self, keys: Sequence[bytes], stop: int, start: int = 0) -> int:
        """How many of the first `stop` keys have a page, without a gap; the first `start` did."""
        if start and keys[start - 1] not in self._page_of:
            start = 0
        for count in range(start, stop):
            if keys[count] not in self._page_of:
                return count
        return stop

    def reserve(self, request: int, tokens: int, keys: Sequence[bytes] = ()) -> list[int] | None:
        """Pages for so many tokens, or None when not enough are free now. The first are those of
        `keys`, all of which have one."""
        assert request not in self._owned, f"request {request} owns pages already"
        fresh = pages_for(tokens) - len(keys)
        if fresh > self.free:
            return None
        shared = [self._page_of[key] for key in keys]
        assert fresh >= 0, f"{len(shared)} pages are more than {tokens} tokens need"
        if fresh > self.free - sum(page in self._unused for page in shared):
            return None
        for page in shared:
            self._use(page)
        pages = shared + [self._take() for _ in range(fresh)]
        self._owned[request] = pages
        return list(pages)

    def pages_of(self, request: int) -> list[int]:
        """The request's pages, in order."""
        return list(self._owned[request])

    def share(self, request: int, keys: Sequence[bytes], start: int, stop: int) -> None:
        """Give up the request's own pages `[start, stop)` for those of the keys, all of which have
        one."""
        pages = self._owned[request]
        for index in range(start, stop):
            self._leave(pages[index])
            pages[index] = self._page_of[keys[index]]
            self._use(pages[index])

    def keep(self, request: int, index: int, key: bytes) -> None:
        """A request's page is full: its KV is what `key` stands for. If another page has that KV
        already and somebody uses it, this one goes without a key."""
        page, twin = self._owned[request][index], self._page_of.get(key)
        if twin is not None:
            if twin not in self._unused:
                return
            del self._unused[twin], self._key_of[twin]
            self._blank.append(twin)
        assert page not in self._key_of, f"page {page} is full already"
        self._page_of[key], self._key_of[page] = page, key
        self.version += 1

    def distrust(self, request: int) -> None:
        """What only this request's pages hold is not to be found any more."""
        for page in self._owned[request]:
            if self._users[page] == 1 and page in self._key_of:
                del self._page_of[self._key_of.pop(page)]

    def release(self, request: int) -> None:
        """The request uses its pages no more. The last of them are written anew first: they are of
        no use without those before them."""
        for page in reversed(self._owned.pop(request)):
            self._leave(page)

    def forget(self) -> None:
        """The KV is gone: no page has a key any more."""
        self._blank.extend(self._unused)
        self._unused.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _take(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._users[page] = 1
        return page

    def _use(self, page: int) -> None:
        self._unused.pop(page, None)
        self._users[page] = self._users.get(page, 0) + 1

    def _leave(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page]:
            return
        del self._users[page]
        self.freed += 1
        self.version += 1
        if page in self._key_of:
            self._unused[page] = None
        else:
            self._blank.append(page)

    def check_integrity(self) -> None:
        """Prove the books: every page is blank, kept or somebody's, and only what has a key is more
        than one request's."""
        users: dict[int, int] = {}
        for pages in self._owned.values():
            assert len(set(pages)) == len(pages), "a request has a page twice"
            for page in pages:
                users[page] = users.get(page, 0) + 1
        assert users == self._users, "a page's users are miscounted"
        listed = sorted([*self._blank, *self._unused, *users])
        assert listed == list(range(self.pages)), "a page is lost or owned twice"
        keys = {page: key for key, page in self._page_of.items()}
        assert keys == self._key_of and len(keys) == len(self._page_of), "keys and pages differ"
        assert keys.keys() >= self._unused.keys(), "a page is kept without a key"
        assert not keys.keys() & set(self._blank), "a blank page has a key"
        assert all(page in keys for page, count in users.items() if count > 1), (
            "a page without a key is two requests'"
        )
