"""What packed matrices take of memory."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.kernels.instruction_sets import KERNELS
from tests.sharding.kernels.world import file_of, random_raw


def test_matrices_take_their_memory_and_give_it_back() -> None:
    """Small ones too, which share large pages."""
    name, (rows, cols) = "Q8_0", (1024, 992)
    file = file_of(w=(name, random_raw(name, rows, cols)))
    kernels = next(iter(KERNELS.values()))
    kernels.pack(file, ["w"])  # what packing needs besides
    before = _anonymous_bytes()
    weights = [kernels.pack(file, ["w"]) for _ in range(100)]
    packed, spare = sum(weight.n_bytes for weight in weights), 10 << 20
    assert abs(_anonymous_bytes() - before - packed) < spare
    weights.clear()
    assert _anonymous_bytes() - before < spare


def _anonymous_bytes() -> int:
    """What this process has of memory that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("Anonymous:"))
    return int(kib) << 10
