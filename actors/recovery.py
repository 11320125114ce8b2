"""What to do after the pipeline broke: which stages to replace, and how often to try. Pure
decisions.

All KV is lost with the epoch: a surviving stage keeps its weights and forgets its requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_TRIES = 6
"""Consecutive repairs that may fail before the engine gives up."""

_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Repair:
    """The next epoch, and the numbers of the stages to start afresh; all others are kept."""

    epoch: int
    replace: tuple[int, ...]


def plan_repair(epoch: int, alive: Sequence[bool]) -> Repair:
    """Replace the dead and keep the living, in a new epoch that makes old frames strangers."""
    dead = tuple(stage for stage, lives in enumerate(alive) if not lives)
    return Repair(epoch + 1, dead)


def wait_before(tries: int) -> float | None:
    """Seconds to wait before try number `tries` (from 0); None when it is time to give up."""
    if tries >= MOST_TRIES:
        return None
    return min(_LONGEST_WAIT_S, 0.5 * 2**tries) if tries else 0.0
