"""The books of a model's pages: those of all layers, and those of layers with a window. Pure.

Models that mix layers with a window and layers that see all have a second pool for the former. A
request needs no more of its pages than hold the window and the longest chunk: they form a ring that
its tokens fill in turn, however many they are. When it ends, the ring is kept as a whole, for one
request that goes on where this one ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.pages import PagePool, pages_for
from sharding.batch import PAGE_SLOTS


@dataclass(frozen=True)
class _Ring:
    """What a request left: its pages, and where another may go on: so many pages of tokens before
    it, and the key that these end with. No page of tokens before number `oldest` is in it."""

    pages: list[int]
    ends: dict[int, bytes]
    oldest: int


class _Rings:
    """Pages of layers with a window, `ring` of them at most for a request."""

    def __init__(self, pages: int, ring: int, window: int) -> None:
        self.pages = pages
        self._ring, self._window = ring, window
        self._blank = list(range(pages - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}
        self._oldest: dict[int, int] = {}  # of a ring that was handed on, by its new owner
        self._kept: OrderedDict[int, _Ring] = OrderedDict()  # by request; left longest ago first

    @property
    def free(self) -> int:
        """Pages that no request owns."""
        return len(self._blank) + sum(len(ring.pages) for ring in self._kept.values())

    def needed(self, tokens: int) -> int:
        """Pages of a request of so many tokens."""
        return min(pages_for(tokens), self._ring)

    def find(self, keys: Sequence[bytes], stop: int) -> tuple[int, int]:
        """After how many of the first `stop` pages, which have these keys, a request may go on (0:
        none), and in whose ring."""
        fitting = [
            (end, number)
            for number, ring in self._kept.items()
            for end, key in ring.ends.items()
            if end <= stop and keys[end - 1] == key
        ]
        return max(fitting, default=(0, 0))

    def reserve(self, request: int, tokens: int, giver: int) -> list[int]:
        """Pages for so many tokens, of which enough are free: first those of the ring that `giver`
        left (0: nobody's), whose tokens lie where this request's will."""
        ring = self._kept.pop(giver) if giver else _Ring([], {}, 0)
        pages, count = ring.pages, self.needed(tokens)
        self._blank.extend(reversed(pages[count:]))
        while len(self._blank) < count - len(pages):
            _, other = self._kept.popitem(last=False)
            self._blank.extend(reversed(other.pages))
        pages = pages[:count] + [self._blank.pop() for _ in range(count - len(pages))]
        self._owned[request], self._oldest[request] = pages, ring.oldest
        return list(pages)

    def pages_of(self, request: int) -> list[int]:
        """The request's ring."""
        return list(self._owned[request])

    def release(self, request: int, keys: Sequence[bytes], written: int) -> None:
        """Free a request's ring, and keep it until its pages are needed. `keys` are those of the
        request's full pages; so many of its tokens are written, or will be by what is in flight."""
        pages = self._owned.pop(request)
        # It need not have written as far as who had the ring before.
        oldest = max(self._oldest.pop(request), (written - 1) // PAGE_SLOTS - self._ring + 1)
        ends: dict[int, bytes] = {}
        for end in range(len(keys) if pages else 0, 0, -1):
            if self._first_seen(end) < oldest:
                break
            ends[end] = keys[end - 1]
        if ends:
            self._kept[request] = _Ring(pages, ends, oldest)
        else:
            self._blank.extend(reversed(pages))

    def _first_seen(self, end: int) -> int:
        """The first page that the token after so many pages sees."""
        return max(0, end * PAGE_SLOTS - self._window + 1) // PAGE_SLOTS

    def forget(self) -> None:
        """The KV is gone."""
        for ring in self._kept.values():
            self._blank.extend(ring.pages)
        self._kept.clear()

    def check_integrity(self) -> None:
        """Prove the books: every page is blank, or in one ring."""
        rings = [*self._owned.values(), *(ring.pages for ring in self._kept.values())]
        listed = sorted([*self._blank, *(page for ring in rings for page in ring)])
        assert listed == list(range(self.pages)), "a window's page is lost or owned twice"


class PagePools:
    """The pool of all layers, and that of layers with a window: `window_pages` of which a request
    takes at most `ring`; 0, as `window`, where there is none."""

    def __init__(self, pages: int, window_pages: int = 0, ring: int = 0, window: int = 0) -> None:
        self._whole = PagePool(pages)
        self._rings = _Rings(window_pages, ring, window)
        self.shared_while_used = not ring
        """Whether a request can use pages of one that still runs: a ring is one request's."""

    @property
    def pages(self) -> int:
        """Of all layers."""
        return self._whole.pages

    @property
    def free(self) -> int:
        """Pages of all layers that nobody uses."""
        return self._whole.free

    @property
    def kept(self) -> int:
        """Of these, the pages whose KV is kept."""
        return self._whole.kept

    @property
    def window_pages(self) -> int:
        """Of layers with a window."""
        return self._rings.pages

    @property
    def window_free(self) -> int:
        """Of these, the pages that nobody uses."""
        return self._rings.free

    @property
    def idle(self) -> bool:
        """Whether nobody uses any."""
        return self.free == self.pages and self.window_free == self.window_pages

    def fit(self, requests: Iterable[int]) -> bool:
        """Whether there is room now for requests of so many tokens, all of them, if no page holds
        what they begin with."""
        tokens = list(requests)
        whole = sum(pages_for(count) for count in tokens)
        window = sum(self._rings.needed(count) for count in tokens)
        return whole <= self._whole.free and window <= self._rings.free

    @property
    def version(self) -> int:
        """Grows whenever a request that found no room may find some."""
        return self._whole.version

    @property
    def freed(self) -> int:
        """Grows whenever pages become free."""
        return self._whole.freed

    def find(self, keys: Sequence[bytes], stop: int, start: int = 0) -> int:
        """How many of the first `stop` pages with these keys there are, in all layers; the first
        `start` were. The order in which pages are written anew may leave a gap before those."""
        return self._whole.find(keys, stop, start)

    def reserve(
        self, request: int, tokens: int, keys: Sequence[bytes] = (), stop: int = 0
    ) -> int | None:
        """Take pages for so many tokens, or None when not enough are free now. Answers how many of
        the first are filled: as many of the first `stop` as can be found under their keys."""
        fresh, window = pages_for(tokens), self._rings.needed(tokens)
        if fresh - stop > self._whole.free or window > self._rings.free:
            return None
        filled, giver = self._whole.find(keys, stop), 0
        if not self.shared_while_used:
            filled, giver = self._rings.find(keys, filled)
        if self._whole.reserve(request, tokens, keys[:filled]) is None:
            return None
        self._rings.reserve(request, tokens, giver)
        return filled

    def share(self, request: int, keys: Sequence[bytes], stop: int, filled: int) -> int:
        """Use what others filled since `reserve`, after which the first `filled` pages were;
        answers how many are now. For a request that wrote none yet, and not while pages cannot be
        shared."""
        assert self.shared_while_used
        found = self._whole.find(keys, stop, filled)
        self._whole.share(request, keys, filled, found)
        return found

    def pages_of(self, request: int) -> tuple[list[int], list[int]]:
        """A request's pages, and those for layers with a window."""
        return self._whole.pages_of(request), self._rings.pages_of(request)

    def distrust(self, request: int) -> None:
        """What a request computed is not to be found any more."""
        self._whole.distrust(request)

    def keep(self, request: int, index: int, key: bytes) -> None:
        """A request's page of all layers is full; see `PagePool`."""
        self._whole.keep(request, index, key)

    def release(self, request: int, keys: Sequence[bytes] = (), written: int = 0) -> None:
        """Free what the request owns. `keys` are those of its full pages; so many of its tokens are
        written, or will be by what is in flight."""
        self._whole.release(request)
        self._rings.release(request, keys, written)

    def forget(self) -> None:
        """All KV is gone."""
        self._whole.forget()
        self._rings.forget()

    def check_integrity(self) -> None:
        """Prove the books of both."""
        self._whole.check_integrity()
        self._rings.check_integrity()
