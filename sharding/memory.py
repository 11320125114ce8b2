"""How much memory this process can still get, as the planner's input. Linux only; no library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def available_bytes(proc: Path = _PROC) -> int:
    """Bytes to be had without swapping: the least of what the kernel estimates, the control groups
    around this process allow and its own limit on addresses leaves."""
    return max(0, min([_meminfo(proc), *_group_rooms(proc), *_address_room(proc)]))


def _meminfo(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _address_room(proc: Path) -> Iterator[int]:
    """What `ulimit -v` leaves."""
    for line in _lines(proc / "self" / "limits"):
        if line.startswith("Max address space"):
            soft = line.split()[3]
            for status in _lines(proc / "self" / "status"):
                if soft != "unlimited" and status.startswith("VmSize:"):
                    yield int(soft) - int(status.split()[1]) * 1024


def _group_rooms(proc: Path) -> Iterator[int]:
    """What each limit leaves, from this process's own group to the outermost that is seen here;
    page cache counts as free."""
    for mount, group, version in _groups(proc):
        names = _FILES[version]
        while True:
            if (room := _room(mount / group, *names)) is not None:
                yield room
            if group == Path():
                break
            group = group.parent


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: limit, use, and the statistic of files that can be dropped."""


def _room(group: Path, limit_name: str, used_name: str, cached_name: str) -> int | None:
    """None where a group has no limit, or memory is not its controller's."""
    try:
        limit = (group / limit_name).read_text().strip()
        used = int((group / used_name).read_text())
        statistics = dict(line.split() for line in _lines(group / "memory.stat"))
        return None if limit == "max" else int(limit) - used + int(statistics.get(cached_name, 0))
    except (OSError, ValueError):
        return None


def _groups(proc: Path) -> Iterator[tuple[Path, Path, int]]:
    """Where a hierarchy that may limit memory is mounted, this process's group below it, and the
    version. Formats: proc_pid_mountinfo(5), cgroups(7)."""
    groups: dict[int, str] = {}
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups[2] = path
        elif "memory" in controllers.split(","):
            groups[1] = path
    for line in _lines(proc / "self" / "mountinfo"):
        fields, _, described = line.partition(" - ")
        _, _, _, root, mount, *_ = [*fields.split(), *5 * [""]]
        kind, _, options, *_ = [*described.split(), *3 * [""]]
        memory = kind == "cgroup" and "memory" in options.split(",")
        version = 2 if kind == "cgroup2" else 1 if memory else 0
        if version in groups:
            yield Path(_unescaped(mount)), _below(groups[version], _unescaped(root)), version


def _below(path: str, root: str) -> Path:
    """A group as seen under a mount whose root is another; the mount itself where it is not below:
    a container sees its own group there."""
    group, top = Path(path.lstrip("/")), Path(root.lstrip("/"))
    if ".." in group.parts or not group.is_relative_to(top):
        return Path()
    return group.relative_to(top)


def _unescaped(path: str) -> str:
    """A mount's path; the kernel writes a blank, and what else would end it, in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _lines(file: Path) -> list[str]:
    """Paths need not be UTF-8; no line where there is no file."""
    try:
        lines = file.read_text("utf-8", "surrogateescape").split("\n")
    except OSError:
        return []
    return [line for line in lines if line]
