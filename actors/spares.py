"""Processes that wait to become a stage.

To start a process, Python and torch in it takes 4 of the 5 seconds in which a small stage that died
is replaced, and where it hung instead, Ray takes 5 more to give back what it had reserved. A spare
reserves nothing: it takes the dead one's place, which nobody else can, as its reservation stays.
It has 180 MB of memory of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.stage_actor import RemoteStage

_AT_THE_LATEST_S = 60.0
"""A spare that starts takes a core for seconds: not while the first requests are answered, if
somebody finds a better moment."""


class Spares:
    """One for each node that has stages on its CPUs. Not for GPUs: Ray shows a process only those
    that it reserved. Thread-safe; what a call costs Ray is done in the background.
    """

    def __init__(self) -> None:
        self._nodes: frozenset[str] = frozenset()
        self._actors: dict[str, ActorHandle] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._closed = False

    def keep_soon(self, nodes: Iterable[str]) -> None:
        """These nodes should have one from the next `keep` on, which comes within a minute."""
        with self._lock:
            self._nodes = frozenset(nodes)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(_AT_THE_LATEST_S, self.keep)
            self._timer.daemon = True
            self._timer.start()

    def keep(self) -> None:
        """Start those that are missing, and end those of other nodes. Without them a repair only
        takes longer, so nothing is raised."""
        with self._lock, contextlib.suppress(RayError):
            if self._closed:
                return
            for node in self._actors.keys() - self._nodes:
                ray.kill(self._actors.pop(node))
            for node in self._nodes - self._actors.keys():
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                options = RemoteStage.options(num_cpus=0, scheduling_strategy=there)
                self._actors[node] = options.remote()

    def take(self, node: str) -> ActorHandle | None:
        """That node's, if there is one; it may have died like any other."""
        with self._lock:
            return self._actors.pop(node, None)

    def close(self) -> None:
        """End them all, for good."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            for actor in self._actors.values():
                ray.kill(actor)
            self._actors.clear()
