"""How stages share cores, GPUs and memory: pure parts of placement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import placement
from actors.shares import (
    Machine,
    NodeFacts,
    Share,
    bundles_of,
    devices_of,
    free_of,
    shares_of,
    threads_of,
)
from sharding.errors import ConfigError
from sharding.kernels import DeviceFacts, cpu_kernels


def machines(cpus: list[int]) -> list[Machine]:
    """Without GPUs."""
    return [Machine(each) for each in cpus]


def on(node: str, identity: str, usable_bytes: int) -> NodeFacts:
    """An actor on a device of a node."""
    return NodeFacts(node, f"host {node}", DeviceFacts("card", identity, usable_bytes))


@pytest.mark.parametrize(
    ("nodes", "stages", "cpus"),
    [([2], 2, 1), ([2], 1, 2), ([2], 3, 1 / 2), ([16], 3, 5), ([8, 8], 2, 8), ([8, 4], 3, 4)],
)
def test_cores_are_divided_over_the_stages(nodes: list[int], stages: int, cpus: float) -> None:
    shares = shares_of(machines(nodes), stages, on_gpus=False)
    assert shares == [Share(stage, cpus) for stage in range(stages)]
    assert bundles_of(shares) == [{"CPU": cpus}] * stages


@pytest.mark.parametrize(
    ("there", "free", "left"),
    [
        ([(8, 4)], (8.0, 4.0), [(8, 4)]),
        ([(8, 4)], (7.0, 3.0), [(7, 3)]),
        ([(8, 4)], (8.0, 3.5), [(8, 3)]),  # half a GPU is nobody's whole one
        ([(8, 0), (2, 2)], (7.0, 1.0), [(5, 0), (2, 1)]),
        ([(8, 2)], (0.0, 0.0), [(8, 2)]),
    ],
)
def test_what_others_hold_is_not_planned_with(
    there: list[tuple[int, int]], free: tuple[float, float], left: list[tuple[int, int]]
) -> None:
    """Four stages on four GPUs of which one is taken share the other three."""
    found = free_of([Machine(*each) for each in there], *free)
    assert [(machine.cpus, machine.gpus) for machine in found] == left


@pytest.mark.parametrize(
    ("nodes", "stages", "cpus"),
    [([16, 4], 2, 4), ([4, 16, 2], 2, 4), ([16, 6], 4, 3), ([8, 1], 4, 1 / 2), ([0, 8], 2, 4)],
)
def test_more_nodes_may_have_stages_than_hold_the_cores(
    nodes: list[int], stages: int, cpus: float
) -> None:
    assert shares_of(machines(nodes), stages, False, wide=True)[0].cpus == cpus


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 64), st.booleans())
def test_every_stage_finds_room(nodes: list[int], stages: int, wide: bool) -> None:
    """As Ray counts: in parts of ten thousand, rounded."""
    cpus = shares_of(machines(nodes), stages, False, wide)[0].cpus
    assert cpus > 0
    room = [node * 10_000 // round(cpus * 10_000) for node in nodes]
    assert sum(room) >= stages
    if wide:
        assert sum(map(bool, room)) >= min(stages, len(nodes))


@pytest.mark.parametrize(
    ("nodes", "gpus"),
    [
        ([1], [1]),
        ([8], [1, 1, 1, 1]),
        ([1], [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ([1], [0.3333, 0.3333, 0.3333]),
        ([1, 1], [1, 1]),
        ([0, 2, 1], [1 / 2, 1 / 2, 1 / 2, 1 / 2, 1]),
        ([4], [1 / 2, 1 / 2, 1, 1, 1]),
    ],
)
def test_gpus_are_divided_over_the_stages(nodes: list[int], gpus: list[float]) -> None:
    """A stage has one GPU or a part of one, and needs no core of its own to start kernels."""
    shares = shares_of([Machine(8, each) for each in nodes], len(gpus), on_gpus=True)
    assert [share.gpus for share in shares] == gpus
    assert {share.cpus for share in shares} == {0}


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5).filter(any), st.integers(1, 64))
def test_every_stage_finds_a_gpu_and_no_gpu_is_left_out(nodes: list[int], stages: int) -> None:
    """As Ray counts: whole GPUs are reserved, and the stages on one do not ask for more than it."""
    shares = shares_of([Machine(8, each) for each in nodes], stages, on_gpus=True)
    assert bundles_of(shares) == [{"GPU": 1}] * min(stages, sum(nodes))
    assert [share.bundle for share in shares] == sorted(share.bundle for share in shares)
    for bundle in range(min(stages, sum(nodes))):
        there = [round(share.gpus * 10_000) for share in shares if share.bundle == bundle]
        assert 0 < sum(there) <= 10_000


def test_without_a_gpu_in_the_cluster_triton_is_refused() -> None:
    with pytest.raises(ConfigError, match="Ray knows of none"):
        shares_of(machines([8, 8]), 2, on_gpus=True)


@pytest.mark.parametrize(
    ("gpus", "with_cuda", "chosen"),
    [(0, True, cpu_kernels()), (2, True, "triton"), (2, False, cpu_kernels())],
)
def test_auto_takes_gpus_where_ray_has_them_and_torch_can(
    gpus: int,
    with_cuda: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(placement, "built_for_gpus", lambda: with_cuda)
    assert placement._choose("auto", [Machine(8), Machine(8, gpus)]) == chosen
    # Never in silence.
    assert ("2 GPUs, but torch was installed without CUDA" in caplog.text) == (
        gpus > 0 and not with_cuda
    )


def test_what_was_chosen_is_not_chosen_again() -> None:
    assert placement._choose("reference", [Machine(8, 2)]) == "reference"
    assert placement._choose("triton", [Machine(8)]) == "triton"


def test_stages_of_one_node_share_its_memory() -> None:
    facts = [on("a", "cpu", 1000), on("a", "cpu", 1000), on("b", "cpu", 900)]
    assert [device.free_bytes for device in devices_of(facts)] == [500, 500, 900]


def test_stages_of_one_gpu_share_its_memory_and_not_its_neighbour_s() -> None:
    """A process knows its GPU as the first one, whichever it is."""
    facts = [on("a", "GPU-1", 900), on("a", "GPU-1", 900), on("a", "GPU-2", 700)]
    assert [device.free_bytes for device in devices_of(facts)] == [450, 450, 700]


@pytest.mark.parametrize(
    ("hosts", "cpus", "threads"),
    [
        ("aa", 1, [2, 2]),
        ("ab", 1, [1, 1]),
        ("aab", 4, [8, 8, 4]),
        ("aaa", 0.3333, [1, 1, 1]),
        ("aaa", 0.5, [1, 1, 1]),
    ],
)
def test_a_stage_computes_on_the_cores_of_its_node_s_stages(
    hosts: str, cpus: float, threads: list[int]
) -> None:
    """One request has its stages work in turn: a stage that left its neighbour's core idle would
    make a lone user wait twice as long."""
    facts = [on(host, "cpu", 1000) for host in hosts]
    assert [threads_of(facts, cpus, stage) for stage in range(len(hosts))] == threads
