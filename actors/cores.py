"""Who gets a core first: a thread that computes, or a process that wakes up for a moment.

Ray's and Serve's processes wake up some 1500 times a second in all, each time for less than a
tenth of a millisecond. Whoever wakes up interrupts, so a step's 150 pieces of work, which all cores
share, wait for one core again and again: 3% of a decoded token on two cores. A process under
Linux's policy for batches gets the same share of the processor but waits for its turn, a
millisecond or two; stages leave a core that long before, whenever they wait for one another.
Everything starts from whoever starts Ray and inherits the policy; the threads on a token's way
leave it. Needs no privilege. Which core a kernel's thread keeps to: `sharding.kernels.take_cores`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def behind_computing() -> Iterator[None]:
    """What this thread starts meanwhile never interrupts a thread that computes."""
    before = os.sched_getscheduler(0)
    _follow(os.SCHED_BATCH)
    try:
        yield
    finally:
        _follow(before)


def compute_first() -> None:
    """This thread, and those that it starts, are on a token's way."""
    _follow(os.SCHED_OTHER)


def _follow(policy: int) -> None:
    # A sandbox may forbid it: then all are alike, as without us.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(0))
