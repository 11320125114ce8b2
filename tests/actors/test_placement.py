"""How stages share cores and memory: pure parts of placement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.placement import cpus_per_stage, devices_of, threads_of
from actors.stage_actor import NodeFacts


@pytest.mark.parametrize(
    ("nodes", "stages", "cpus"),
    [([2], 2, 1), ([2], 1, 2), ([2], 3, 1 / 2), ([16], 3, 5), ([8, 8], 2, 8), ([8, 4], 3, 4)],
)
def test_cores_are_divided_over_the_stages(nodes: list[int], stages: int, cpus: float) -> None:
    assert cpus_per_stage(nodes, stages) == cpus


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 64))
def test_every_stage_finds_room(nodes: list[int], stages: int) -> None:
    cpus = cpus_per_stage(nodes, stages)
    assert cpus > 0
    assert sum(int(node / cpus) for node in nodes) >= stages


def test_stages_of_one_node_share_its_memory() -> None:
    facts = [NodeFacts("a", "h1", 1000), NodeFacts("a", "h1", 1000), NodeFacts("b", "h2", 900)]
    sizes = [device.free_bytes for device in devices_of(facts)]
    assert sizes[0] == sizes[1] < sizes[2]
    assert sizes[0] + sizes[1] <= 1000
    assert sizes[2] <= 900


@pytest.mark.parametrize(
    ("hosts", "cpus", "threads"),
    [("aa", 1, [2, 2]), ("ab", 1, [1, 1]), ("aab", 4, [8, 8, 4]), ("aaa", 1 / 3, [1, 1, 1])],
)
def test_a_stage_computes_on_the_cores_of_its_node_s_stages(
    hosts: str, cpus: float, threads: list[int]
) -> None:
    """One request has its stages work in turn: a stage that left its neighbour's core idle would
    make a lone user wait twice as long."""
    facts = [NodeFacts(host, host, 1000) for host in hosts]
    assert [threads_of(facts, cpus, stage) for stage in range(len(hosts))] == threads
