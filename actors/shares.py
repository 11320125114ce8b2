"""What each stage gets of the machines: cores, a GPU or a part of one, memory. Pure arithmetic; Ray
is asked in `placement.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sharding.errors import ConfigError
from sharding.kernels import DeviceFacts
from sharding.planner import Device

_UNITS = 10_000
"""Ray counts resources in parts of so many, rounded: 7 times 1/7 would be more than there is."""


@dataclass(frozen=True)
class Machine:
    """What Ray has of a node."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Share:
    """What a stage gets of its bundle, a device that Ray reserves: cores, or one GPU or part of it.

    `gpus` is 0 for stages on CPUs.
    """

    bundle: int
    cpus: float
    gpus: float = 0


@dataclass(frozen=True)
class NodeFacts:
    """Where an actor landed. The device is shared by all stages on it."""

    node_id: str
    host: str
    device: DeviceFacts


def free_of(machines: Sequence[Machine], cpus: float, gpus: float) -> list[Machine]:
    """The machines without what others hold, `cpus` and `gpus` being free in all. Ray does not say
    where: the largest machine is thought to have the least left. With nothing free all counts, so
    that the refusal says who is in the way."""
    return [
        Machine(*has)
        for has in zip(
            _less([machine.cpus for machine in machines], int(cpus)),
            _less([machine.gpus for machine in machines], int(gpus)),
            strict=True,
        )
    ]


def _less(amounts: Sequence[int], free: int) -> list[int]:
    left = list(amounts)
    while 0 < free < sum(left):
        left[left.index(max(left))] -= 1
    return left


def shares_of(
    machines: Sequence[Machine], stages: int, on_gpus: bool, wide: bool = False
) -> list[Share]:
    """The most of a device for each stage so that all find room, none across devices; `wide`: so
    that as many machines as can have a stage, which takes memory where cores alone would not.

    A GPU's stage reserves no cores: it only starts kernels. Raises `ConfigError` if there are no
    GPUs.
    """
    if not on_gpus:
        nodes = [machine.cpus for machine in machines]
        cpus = _even_cpus(nodes, stages) if wide else _most_cpus(nodes, stages)
        return [Share(stage, cpus) for stage in range(stages)]
    gpus = sum(machine.gpus for machine in machines)
    if not gpus:
        raise ConfigError(
            "--kernels triton needs GPUs, and Ray knows of none: start Ray where they are, or with "
            "`ray start --num-gpus`; `--kernels cpu` computes without"
        )
    # Whole GPUs are reserved, also where stages share them: of 4 GPUs none is left out by a fifth
    # stage, and neighbours in the pipeline are neighbours on a GPU.
    used = min(stages, gpus)
    bundles = [stage * used // stages for stage in range(stages)]
    sharing = Counter(bundles)
    return [Share(bundle, 0, _rounded_down(1 / sharing[bundle])) for bundle in bundles]


def bundles_of(shares: Sequence[Share]) -> list[dict[str, float]]:
    """What Ray reserves, bundle by bundle."""
    bundles: dict[int, dict[str, float]] = {}
    for share in shares:
        bundles[share.bundle] = {"GPU": 1} if share.gpus else {"CPU": share.cpus}
    return list(bundles.values())


def _most_cpus(cpus_per_node: Sequence[int], stages: int) -> float:
    """A fraction such as 1/2 where cores are fewer than stages: they then share them."""
    for cpus in range(max(cpus_per_node, default=1), 0, -1):
        if sum(node // cpus for node in cpus_per_node) >= stages:
            return cpus
    return _rounded_down(1 / -(-stages // max(1, sum(cpus_per_node))))


def _even_cpus(cpus_per_node: Sequence[int], stages: int) -> float:
    """The same with stages dealt out to the nodes in turn, the largest first."""
    used = sorted(filter(None, cpus_per_node), reverse=True)[:stages]
    least, most_stages = used[-1], -(-stages // len(used))
    return float(least // most_stages) or _rounded_down(least / most_stages)


def _rounded_down(share: float) -> float:
    return int(share * _UNITS + 1e-6) / _UNITS


def threads_of(facts: Sequence[NodeFacts], cpus: float, stage: int) -> int:
    """Threads of a stage: the cores that the pipeline's stages on its node reserved, together.

    One request has its stages work in turn, so each should have all of them then. When they work
    at once, they share: a kernel never waits for a thread that found no core.
    """
    node = facts[stage].node_id
    there = sum(fact.node_id == node for fact in facts)
    return max(1, int((cpus + 1 / _UNITS) * there))


def devices_of(facts: Sequence[NodeFacts]) -> list[Device]:
    """Each stage's device: an equal part of what its stages can use of it."""
    places = [(fact.node_id, fact.device.identity) for fact in facts]
    sharing = Counter(places)
    return [
        Device(f"{fact.device.name} on {fact.host}", fact.device.usable_bytes // sharing[place])
        for fact, place in zip(facts, places, strict=True)
    ]
