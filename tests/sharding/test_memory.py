"""The memory that a plan may count on: a machine's, a container's, a shell's limit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.memory import available_bytes

MIB = 1 << 20
MACHINE = 8000


def machine(
    tmp_path: Path, cgroup: str = "", mountinfo: str = "", groups: dict[str, str] | None = None
) -> Path:
    """A `/proc` of 8000 MiB available; `{tmp}` in `mountinfo` is where `groups`' files are."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {MACHINE * 1024} kB\n")
    for name, text in {"cgroup": cgroup, "mountinfo": mountinfo.format(tmp=tmp_path)}.items():
        (proc / "self" / name).write_text(text, "utf-8", "surrogateescape")
    for name, text in (groups or {}).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return proc


def two(path: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """A group's files, version 2, in MiB."""
    return {
        f"{path}/memory.max": limit if limit == "max" else str(int(limit) * MIB),
        f"{path}/memory.current": str(used * MIB),
        f"{path}/memory.stat": f"anon 1\ninactive_file {cached * MIB}\nactive_file 7\n",
    }


def one(path: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    """The same of version 1."""
    return {
        f"{path}/memory.limit_in_bytes": str(limit * MIB),
        f"{path}/memory.usage_in_bytes": str(used * MIB),
        f"{path}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached * MIB}\n",
    }


UNIFIED = "30 25 0:26 / {tmp}/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
OLD = (
    "31 25 0:27 / {tmp}/cpu rw - cgroup cgroup rw,cpu\n"
    "32 25 0:28 ROOT {tmp}/mem rw shared:9 - cgroup cgroup rw,memory\n"
)
NO_LIMIT = ((1 << 63) - 4096) // MIB


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "groups", "expected"),
    [
        ("", "", {}, MACHINE),
        ("0::/\n", "", {}, MACHINE),
        ("0::/\n", "30 25 0:26 / {tmp}/cg rw\n\n30 - cgroup2\n", {}, MACHINE),
        # A container with a namespace of its own sees its group at the top.
        ("0::/\n", UNIFIED, two("cg", "1000", 400, 150), 750),
        ("0::/\n", UNIFIED, two("cg", "max", 400), MACHINE),
        # A service or a batch job: the top has no limit's file, its own group or one above does.
        ("0::/a/b\n", UNIFIED, two("cg/a/b", "900", 100), 800),
        ("0::/a/b\n", UNIFIED, two("cg/a", "700", 100) | two("cg/a/b", "max", 50), 600),
        # Started from outside of the namespace that is mounted here.
        ("0::/../x\n", UNIFIED, two("cg", "500", 100), 400),
        # Over the limit for a moment.
        ("0::/\n", UNIFIED, two("cg", "500", 600), 0),
        # Version 1, beside hierarchies that do not limit memory.
        (
            "3:cpu:/a\n2:memory:/a/b\n0::/z\n",
            OLD.replace("ROOT", "/"),
            one("mem", NO_LIMIT, 90) | one("mem/a/b", 600, 250, 50),
            400,
        ),
        # A container without a namespace: its path is the host's, its mount begins there.
        ("2:memory:/docker/77\n", OLD.replace("ROOT", "/docker/77"), one("mem", 300, 100), 200),
        # Names that are no UTF-8, or that end lines elsewhere; a mount with a blank in its path.
        (
            "1:name=\udcff\x85:/\n0::/a\x0bb\n",
            UNIFIED.replace("/cg ", r"/c\040g ") + "33 25 0:29 / /\udce4 rw - tmpfs tmpfs rw\n",
            two("c g/a\x0bb", "900", 100),
            800,
        ),
    ],
)
def test_the_least_of_all_limits(
    tmp_path: Path, cgroup: str, mountinfo: str, groups: dict[str, str], expected: int
) -> None:
    assert available_bytes(machine(tmp_path, cgroup, mountinfo, groups)) == expected * MIB


def test_a_limit_on_addresses_counts() -> None:
    """As `ulimit -v` sets it."""
    code = "from sharding.memory import available_bytes; print(available_bytes())"
    limit = 700 * MIB
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert 0 < int(done.stdout) < limit
