"""Page bookkeeping: which KV pages are free, which request owns the others. Pure, no tensors.

One pool serves all stages: page p of a request is page p on every stage, each for its own layers.
So one allocation reserves everywhere, and one release frees everywhere. Reuse before the last batch
in flight has run is safe: every stage takes batches in order, so a new owner's writes come after
the old owner's.

Models some of whose layers have a window have a second pool for those. A request needs no more of
its pages than hold the window and the longest chunk, however long it grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sharding.batch import PAGE_SLOTS


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_SLOTS)


class PagePool:
    """Owner of the page numbers `[0, pages)`."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def reserve(self, request: int, tokens: int) -> list[int] | None:
        """Pages for so many tokens, or None when not enough are free now."""
        assert request not in self._owned, f"request {request} owns pages already"
        count = pages_for(tokens)
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._owned[request] = pages
        return pages

    def release(self, request: int) -> None:
        """Free what the request owns."""
        self._free.extend(reversed(self._owned.pop(request)))

    def check_integrity(self) -> None:
        """Prove the books: every page is free or owned by one request, and by one only."""
        listed = sorted(self._free + [page for pages in self._owned.values() for page in pages])
        assert listed == list(range(self.pages)), "a page is lost or owned twice"


@dataclass(frozen=True)
class Reserved:
    """A request's pages, and those for layers with a window."""

    pages: list[int]
    window_pages: list[int] = field(default_factory=list)


class PagePools:
    """The pool of all layers, and that of layers with a window: `window_pages` of which a request
    takes at most `ring`; both 0 where there is none."""

    def __init__(self, pages: int, window_pages: int = 0, ring: int = 0) -> None:
        self._whole = PagePool(pages)
        self._window = PagePool(window_pages)
        self._ring = ring

    @property
    def pages(self) -> int:
        """Of all layers."""
        return self._whole.pages

    @property
    def free(self) -> int:
        """Pages of all layers that nobody owns."""
        return self._whole.free

    @property
    def window_pages(self) -> int:
        """Of layers with a window."""
        return self._window.pages

    @property
    def window_free(self) -> int:
        """Of these, the pages that nobody owns."""
        return self._window.free

    @property
    def idle(self) -> bool:
        """Whether nobody owns any."""
        return all(pool.free == pool.pages for pool in (self._whole, self._window))

    def fit(self, requests: Iterable[int]) -> bool:
        """Whether there is room now for requests of so many tokens, all of them."""
        tokens = list(requests)
        whole = sum(pages_for(count) for count in tokens)
        window = sum(self._of_window(count) for count in tokens)
        return whole <= self._whole.free and window <= self._window.free

    def reserve(self, request: int, tokens: int) -> Reserved | None:
        """Pages for so many tokens, or None when not enough are free now."""
        if not self.fit([tokens]):
            return None
        pages = self._whole.reserve(request, tokens)
        window = self._window.reserve(request, self._of_window(tokens) * PAGE_SLOTS)
        assert pages is not None and window is not None, "free pages are gone"
        return Reserved(pages, window)

    def release(self, request: int) -> None:
        """Free what the request owns."""
        self._whole.release(request)
        self._window.release(request)

    def check_integrity(self) -> None:
        """Prove the books of both."""
        self._whole.check_integrity()
        self._window.check_integrity()

    def _of_window(self, tokens: int) -> int:
        return min(pages_for(tokens), self._ring)
