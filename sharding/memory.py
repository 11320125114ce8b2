"""How much memory this machine can still give, as the planner's input. Linux only; asks no
library."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes to be had without swapping: the kernel's estimate, or a container's limit."""
    limits = [_meminfo()]
    if (room := _cgroup_room()) is not None:
        limits.append(room)
    return min(limits)


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _cgroup_room() -> int | None:
    """What the container's limit leaves (cgroup 2); page cache counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = [
            int(line.split()[1])
            for line in (_CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        ]
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + sum(cached))
