"""Page bookkeeping: which KV pages are free, which request owns the others. Pure, no tensors.

One pool serves all stages: page p of a request is page p on every stage, each for its own layers.
So one allocation reserves everywhere, and one release frees everywhere. Reuse before the last batch
in flight has run is safe: every stage takes batches in order, so a new owner's writes come after
the old owner's.
"""

from __future__ import annotations

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
