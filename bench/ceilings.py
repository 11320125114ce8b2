"""What this machine can do at the moment: memory read bandwidth and torch's float32 GEMM rate.

Speed of a shared machine drifts by tens of percent within minutes, so a share of a ceiling means
something only if both were measured side by side. `best_times` runs several samples in turn and
keeps each one's best time; the ceilings are two samples among the others.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

Sample = Callable[[], object]
"""Something to time as a whole."""

_PROBE_BYTES = 1 << 29  # sixteen times the largest last-level cache of one core complex
_READ_COLS = 4096
_GEMM_TOKENS, _GEMM_COLS, _GEMM_ROWS = 512, 2048, 2048


class Ceilings:
    """Samples on so many threads. The GEMM leaves torch with one thread, as kernels want."""

    gemm_flops = 2 * _GEMM_TOKENS * _GEMM_COLS * _GEMM_ROWS
    read_bytes = _PROBE_BYTES

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        # Written, not zeros: untouched pages are all one page, which stays in the cache.
        matrix = torch.ones(_PROBE_BYTES // (4 * _READ_COLS), _READ_COLS)
        self._shares = matrix.chunk(threads)
        self._words = [share.numpy().view(np.int64) for share in self._shares]
        self._x_I = torch.ones(_READ_COLS)
        self._x_TI = torch.rand(_GEMM_TOKENS, _GEMM_COLS)
        self._w_OI = torch.rand(_GEMM_ROWS, _GEMM_COLS)

    @property
    def reads(self) -> tuple[Sample, Sample]:
        """Two ways to read memory once; what it can do is the faster one's rate.

        From end to end, a thread one run of addresses; and several rows of a matrix at a time, as
        BLAS does: some processors fetch more, by a third or so, when several runs are read side by
        side. Both let go of Python's lock.
        """
        return self._read_in_one_run, self._read_in_several

    def _read_in_one_run(self) -> None:
        list(self._pool.map(np.sum, self._words))

    def _read_in_several(self) -> None:
        list(self._pool.map(self._product, self._shares))

    def _product(self, share: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(1)  # a setting of each thread
        return torch.mv(share, self._x_I)

    def gemm(self) -> None:
        """`x @ w.T` with torch."""
        torch.set_num_threads(self._threads)
        torch.mm(self._x_TI, self._w_OI.T)
        torch.set_num_threads(1)


class Neighbours:
    """How many cores were busy with something else since this was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time(), _busy_s()

    def cores(self) -> float:
        """Other processes of this machine, and what its host took away for other machines."""
        wall_s, own_s, busy_s = self._begin
        others_s = (_busy_s() - busy_s) - (time.process_time() - own_s)
        return max(0.0, others_s / (time.perf_counter() - wall_s))


def _busy_s() -> float:
    # cpu  user nice system idle iowait irq softirq steal: see proc_stat(5)
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def best_times(samples: Sequence[Sample], rounds: int = 3, spend_s: float = 0.1) -> list[float]:
    """The best time of each sample, in seconds, in `rounds` turns of `spend_s` (at least one run).

    The best rather than the median: what else runs on the machine only ever slows a sample down.
    """
    best = [math.inf] * len(samples)
    for _ in range(rounds):
        for number, sample in enumerate(samples):
            best[number] = min(best[number], _best_time(sample, spend_s))
    return best


def _best_time(sample: Sample, spend_s: float) -> float:
    best, end = math.inf, time.perf_counter() + spend_s
    while (begin := time.perf_counter()) < end or best == math.inf:
        sample()
        best = min(best, time.perf_counter() - begin)
    return best
