"""What a measurement must say about where it was made: processor, cores, memory, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_VECTORS: list[str] = ["amx_int8", "avx512_vnni", "avx512f", "avx2", "asimd"]


def describe_machine() -> str:
    """One line, such as `2 x AMD EPYC, 23.4 GiB, avx512_vnni, Linux 6.1`."""
    info = Path("/proc/cpuinfo").read_text()
    lines = (line.partition(":") for line in info.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flags = fields.get("flags", "").split()
    vectors = [name for name in _VECTORS if name in flags] or ["no vectors"]
    name = fields.get("model name", platform.machine())
    kernel = f"{platform.system()} {platform.release()}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} x {name}, {memory:.1f} GiB, {vectors[0]}, {kernel}"


def describe_commit() -> str:
    """The commit of the source tree, marked when it was changed since; "installed" outside one."""
    tree = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "installed"
    return found.stdout.strip()
