"""Who gets a core first: what is started behind, what leaves that, and who keeps to which core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from actors.cores import behind_computing, compute_first
from sharding.kernels import take_cores, use_threads
from tests.served import Served

_ASK = "import os; print(os.sched_getscheduler(0))"


def _policy_of_a_child() -> int:
    return int(subprocess.run([sys.executable, "-c", _ASK], capture_output=True).stdout)


def test_what_is_started_behind_computing_stays_there() -> None:
    before = os.sched_getscheduler(0)
    with behind_computing():
        assert _policy_of_a_child() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before
    assert _policy_of_a_child() == before


def test_a_thread_comes_to_the_front_alone() -> None:
    found = []

    def work() -> None:
        compute_first()
        found.append(os.sched_getscheduler(0))

    with behind_computing():
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        found.append(os.sched_getscheduler(0))
    assert found == [os.SCHED_OTHER, os.SCHED_BATCH]


def _cores_of_threads(take: bool) -> list[set[int]]:
    """Where the kernels' caller and their other threads may run."""
    cores = os.sched_getaffinity(0)
    before = set(os.listdir("/proc/self/task"))
    found: list[set[int]] = []

    def call() -> None:
        use_threads(len(cores), "cpu")
        if take:
            take_cores("cpu")
        mine = set(os.listdir("/proc/self/task")) - before
        found.extend(os.sched_getaffinity(int(thread)) for thread in mine)

    caller = threading.Thread(target=call)
    caller.start()
    caller.join()
    use_threads(1, "cpu")
    return found


def test_kernels_that_have_all_cores_keep_to_one_each() -> None:
    cores = os.sched_getaffinity(0)
    assert sorted(_cores_of_threads(take=True), key=min) == [{core} for core in sorted(cores)]
    assert _cores_of_threads(take=False) == [cores] * len(cores)
    assert os.sched_getaffinity(0) == cores, "only the caller's own thread moves"


def test_kernels_that_have_fewer_threads_run_anywhere() -> None:
    cores = os.sched_getaffinity(0)
    use_threads(len(cores) + 1, "cpu")
    take_cores("cpu")
    assert os.sched_getaffinity(0) == cores
    use_threads(1, "cpu")


TOO_MANY = """
import resource
from sharding.errors import ConfigError
from sharding.kernels import use_threads

use_threads(2, "cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
try:
    use_threads(4000, "cpu")
except ConfigError as error:
    print(error)
use_threads(2, "cpu")
use_threads(1, "cpu")
"""


def test_threads_that_the_system_refuses_are_an_error() -> None:
    """In a container that allows few: said, and the process goes on with what it had."""
    done = subprocess.run([sys.executable, "-c", TOO_MANY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--threads 4000: only \d+ of 4000 threads .*pids.max", done.stdout)


@pytest.mark.ray
def test_served_stages_compute_before_everything_else(served: Served) -> None:
    engine, stages = served.deployment.pids()

    def policies(pid: int) -> list[int]:
        threads = Path(f"/proc/{pid}/task").iterdir()
        return [os.sched_getscheduler(int(thread.name)) for thread in threads]

    assert os.sched_getscheduler(engine) == os.SCHED_BATCH
    for pid in (engine, *stages):
        found = policies(pid)
        assert os.SCHED_OTHER in found, "whatever is on a token's way"
        assert found.count(os.SCHED_BATCH) > found.count(os.SCHED_OTHER)
