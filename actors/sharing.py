"""Requests that begin alike, some of which have begun: who computes a page that others could wait
for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actors.running import Running


class Leaders:
    """Who computes the page of a key."""

    def __init__(self, patience: int) -> None:
        """`patience`: steps after which a request that was not fed is not worth waiting for: others
        keep it from going on."""
        self._patience = patience
        self._of: dict[bytes, Running] = {}

    def __len__(self) -> int:
        return len(self._of)

    def awaited(self, entry: Running, step: int) -> bool:
        """Whether a request that has not begun had better wait."""
        leader = self._of.get(entry.awaited_key)
        return leader is not None and self._moves(leader, step)

    def _moves(self, leader: Running, step: int) -> bool:
        return step - leader.fed <= self._patience

    def add(self, entry: Running, step: int) -> None:
        """A request begins: others may wait for its pages."""
        for key in entry.keys[entry.kept :]:
            leader = self._of.get(key)
            if leader is None or not self._moves(leader, step):
                self._of[key] = entry

    def drop(self, entry: Running, stop: int) -> None:
        """Nobody needs to wait any more for its pages up to number `stop`."""
        for key in entry.keys[entry.kept : stop]:
            if self._of.get(key) is entry:
                del self._of[key]


def late(fed: Iterable[Running], reading: Sequence[Running]) -> set[Running]:
    """Of those that read, who would begin beside one that begins in this step and computes what
    they could wait for."""
    begun: set[Running] = set()
    coming: set[bytes] = set()
    for entry in fed:
        if not entry.opened and entry.awaited_key not in coming:
            begun.add(entry)
            coming.update(entry.keys[entry.kept :])
    rest = (entry for entry in reading if not entry.opened and entry not in begun)
    return {entry for entry in rest if entry.awaited_key in coming}
