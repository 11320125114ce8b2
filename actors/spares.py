"""Processes that wait to become a stage.

To start a process, Python and torch in it takes 4 of the 5 seconds in which a small stage that died
is replaced, and where it hung instead, Ray takes 5 more to give back what it had reserved. A spare
reserves nothing: it takes the dead one's place, which nobody else can, as its reservation stays.
It has 180 MB of memory of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.stage_actor import RemoteStage


class Spares:
    """One for each node that has stages on its CPUs. Not for GPUs: Ray shows a process only those
    that it reserved. Thread-safe; what a call costs Ray is done in the background.
    """

    def __init__(self) -> None:
        self._actors: dict[str, ActorHandle] = {}
        self._lock = threading.Lock()
        self._closed = False

    def keep(self, nodes: Iterable[str]) -> None:
        """Start those that are missing, and end those of other nodes."""
        with self._lock:
            if self._closed:
                return
            wanted = set(nodes)
            for node in self._actors.keys() - wanted:
                ray.kill(self._actors.pop(node))
            for node in wanted - self._actors.keys():
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
            for actor in self._actors.values():
                ray.kill(actor)
            self._actors.clear()
