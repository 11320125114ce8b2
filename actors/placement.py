"""From a plan to running stages on Ray: placement group, actors, loading, joining, replacing the
dead.

The only file that asks Ray for anything (beside the actor's own shell). Ray's exceptions become
ours here.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine import ReadyPipeline
from actors.local import plan_limits, stage_specs
from actors.pipeline import SocketPipeline
from actors.recovery import plan_repair
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
from actors.spares import Spares
from actors.stage_actor import JOIN_TIMEOUT_S, LEAVE_TIMEOUT_S, Joint, RemoteStage
from actors.stats import StageStats
from actors.transport import Listener, connect
from sharding.errors import (
    ConfigError,
    DoesNotFitError,
    LongspanError,
    ModelFileError,
    PeerLostError,
    PipelineError,
    StageError,
    UnavailableError,
)
from sharding.gguf.reader import GGUFFile
from sharding.kernels import built_for_gpus, cpu_kernels
from sharding.model_plan import ModelPlan, Wanted, plan_model
from sharding.stage_spec import StageSpec

_PLACE_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 60.0
_SETTLE_S = 5.0
_PING_TIMEOUT_S = 5.0
_POLL_S = 0.2

log = logging.getLogger("longspan.placement")


@dataclass(frozen=True)
class PlacementConfig:
    """What to place. `threads` of each stage; None: as many as the cluster's cores allow."""

    model: Path
    stages: int
    wanted: Wanted
    threads: int | None = None
    max_waiting: int = 256
    prefix_cache: bool = True


class RayStages:
    """A `StageSource` of Ray actors, one a stage. They die with the process that placed them."""

    def __init__(self, config: PlacementConfig) -> None:
        self._config = config
        self._epoch = 0
        self._group: PlacementGroup | None = None
        self._actors: list[ActorHandle] = []
        self._facts: list[NodeFacts] = []
        self._specs: list[StageSpec] = []
        self._plan: ModelPlan | None = None
        self._shares: list[Share] = []
        self._spares = Spares()
        self._closed = False

    def open(self, report: Callable[[float, str], None]) -> ReadyPipeline:
        """Place, plan by what is free where the actors landed, load, join."""
        config = self._config
        report(0.0, f"placing {config.stages} stages")
        kernels = self._place(report)
        try:
            self._plan = self._planned(kernels)
        except DoesNotFitError as error:
            self._plan = self._planned_wider(kernels, error, report)
        self._specs = stage_specs(str(config.model), self._plan)
        self._load(range(config.stages), report)
        return self._join(0)

    def repair(self, report: Callable[[float, str], None]) -> ReadyPipeline:
        """Replace the stages that died and join all in a new epoch."""
        if not self._specs:
            return self.open(report)
        repair = plan_repair(self._epoch, _end_the_silent(self._actors))
        try:
            for stage in repair.replace:
                spare = self._spares.take(self._facts[stage].node_id)
                self._actors[stage] = spare or self._start(stage)
            self._check_open()
            asked = [
                self._actors[stage].facts.remote(self._specs[stage].kernels)
                for stage in repair.replace
            ]
            for stage, facts in zip(repair.replace, _get(asked, "asking the nodes"), strict=True):
                self._facts[stage] = facts
            self._load(repair.replace, report)
        except (ConfigError, ModelFileError) as error:
            # The same options and file worked before: it is the machine, and that may come back.
            raise StageError(f"replacing stages {list(repair.replace)}: {error}") from error
        return self._join(repair.epoch)

    def _place(self, report: Callable[[float, str], None]) -> str:
        """Start the stages on what the cluster has; which kernels they compute with."""
        self._release()
        wanted, machines = self._config.wanted.kernels, _machines()
        kernels = _choose(wanted, machines)
        try:
            self._start_all(kernels, machines)
        except ConfigError as error:
            if kernels == wanted:  # nothing falls back from what was asked for
                raise
            log.warning("stages compute on CPUs: %s", error)
            report(0.0, f"placing stages on CPUs, since no GPU can be used: {error}")
            kernels = cpu_kernels()
            self._start_all(kernels, machines)
        return kernels

    def _planned(self, kernels: str) -> ModelPlan:
        with GGUFFile.open(self._config.model) as file:
            wanted = replace(self._config.wanted, kernels=kernels)
            return plan_model(file, devices_of(self._facts), wanted)

    def _planned_wider(
        self, kernels: str, misfit: DoesNotFitError, report: Callable[[float, str], None]
    ) -> ModelPlan:
        """Start the stages again on more nodes, for their memory; raises `misfit` where all are in
        use, as GPUs always are."""
        used = len({facts.node_id for facts in self._facts})
        nodes = sum("CPU" in has for has in _alive())
        if kernels == "triton" or used >= min(self._config.stages, nodes):
            raise misfit
        report(0.0, "placing stages on more nodes, for their memory")
        self._release()
        self._start_all(kernels, _machines(), wide=True)
        try:
            return self._planned(kernels)
        except DoesNotFitError as wider:
            raise max(wider, misfit, key=lambda error: error.max_context) from None

    def _start_all(self, kernels: str, machines: Sequence[Machine], wide: bool = False) -> None:
        self._release()
        on_gpus, threads = kernels == "triton", self._config.threads
        shares = shares_of(machines, self._config.stages, on_gpus, wide)
        # More threads than cores is a choice, not a reservation that could find no place.
        self._shares = [replace(each, cpus=min(each.cpus, threads or each.cpus)) for each in shares]
        self._group = _reserve(bundles_of(self._shares), "SPREAD" if wide else "PACK")
        self._actors = [self._start(stage) for stage in range(len(shares))]
        self._check_open()
        self._facts = self._ask_all(kernels)
        if on_gpus:  # again: every process that looked at its GPU has taken some of it by now
            self._facts = self._ask_all(kernels)

    def _start(self, stage: int) -> ActorHandle:
        share = self._shares[stage]
        options = RemoteStage.options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=share.bundle
            ),
        )
        return options.remote()

    def _ask_all(self, kernels: str) -> list[NodeFacts]:
        return _get([actor.facts.remote(kernels) for actor in self._actors], "asking the nodes")

    def _check_open(self) -> None:
        if self._closed:
            self._release()
            raise UnavailableError("the engine is shutting down")

    def _load(self, stages: Sequence[int], report: Callable[[float, str], None]) -> None:
        threads = self._config.threads
        pending = [
            self._actors[stage].load.remote(
                stage,
                self._specs[stage],
                threads or threads_of(self._facts, self._shares[stage].cpus, stage),
            )
            for stage in stages
        ]
        loads = list(pending)
        while pending:
            self._check_open()
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
            asked = [self._actors[stage].progress.remote() for stage in stages]
            shares = _get(asked, "watching the stages load")
            report(sum(shares) / len(shares), f"loading {len(loads)} stages")
        try:
            _get(loads, "loading")
        except DoesNotFitError as error:
            # It did when the nodes were asked. The next try plans with what is free then.
            raise StageError(str(error)) from error

    def _join(self, epoch: int) -> ReadyPipeline:
        """All listen before any connects, so that nobody has to wait for a neighbour."""
        assert self._plan is not None, "joined before it was planned"
        self._epoch = epoch
        nodes = [facts.node_id for facts in self._facts]
        here = ray.get_runtime_context().get_node_id()
        before = [here, *nodes[:-1]]
        over_tcp = [node != upstream for node, upstream in zip(nodes, before, strict=True)]
        secret = secrets.token_bytes(32)
        addresses = _get(
            [actor.listen.remote(tcp) for actor, tcp in zip(self._actors, over_tcp, strict=True)],
            "opening the edges",
            LEAVE_TIMEOUT_S + _CALL_TIMEOUT_S,
        )
        back = Listener(None if nodes[-1] == here else ray.util.get_node_ip_address())
        try:
            downstream = [*addresses[1:], back.address]
            joints = [Joint(epoch, secret, address) for address in downstream]
            calls = zip(self._actors, joints, strict=True)
            _get([actor.join.remote(joint) for actor, joint in calls], "joining the stages")
            front = connect(addresses[0], secret, epoch)
            last = back.accept(secret, epoch, JOIN_TIMEOUT_S)
        finally:
            back.close()
        self._spares.keep_soon(nodes if self._plan.kernels != "triton" else ())
        pipeline = SocketPipeline(front, last, len(self._actors))
        config = self._config
        limits = plan_limits(self._plan, config.max_waiting, config.prefix_cache)
        return ReadyPipeline(pipeline, limits, epoch)

    def stats(self) -> list[StageStats]:
        """What each stage holds; empty while one cannot answer."""
        try:
            return _get([actor.stats.remote() for actor in self._actors], "asking for statistics")
        except PipelineError:
            return []

    def pids(self) -> list[int]:
        """The stages' processes, each a number on its own node."""
        return _get([actor.pid.remote() for actor in self._actors], "asking for processes")

    def check(self) -> None:
        """Prove that every stage answers; end those that do not, and raise `PeerLostError`."""
        lost = [stage for stage, lives in enumerate(_end_the_silent(self._actors)) if not lives]
        if lost:
            raise PeerLostError(f"stage {lost[0]} does not answer")

    def use_quiet(self) -> None:
        """Start processes for stages that may die later."""
        self._spares.keep()

    def close(self) -> None:
        """End the actors and give their resources back; an `open` under way gives up."""
        self._closed = True
        self._spares.close()
        self._release()

    def _release(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        # The list stays: whoever is in the middle of it, on another thread, finds actors that died.
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _alive() -> list[dict[str, float]]:
    """What each node has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _machines() -> list[Machine]:
    """What nobody holds; former stages of ours, or of a replica that died, may be letting go."""
    machines = [Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in _alive()]
    until = time.monotonic() + _SETTLE_S
    while True:
        free = ray.available_resources()
        found = free_of(machines, free.get("CPU", 0.0), free.get("GPU", 0.0))
        if found == machines or time.monotonic() >= until:
            return found
        time.sleep(_POLL_S)


def _choose(kernels: str, machines: Sequence[Machine]) -> str:
    """ "auto" is GPUs if there are any: those of the cluster, not of this process."""
    if kernels != "auto":
        return kernels
    gpus = sum(machine.gpus for machine in machines)
    if gpus and built_for_gpus():
        return "triton"
    if gpus:
        log.warning(
            "the cluster has %d GPUs, but torch was installed without CUDA: stages compute on CPUs",
            gpus,
        )
    return cpu_kernels()


def _reserve(bundles: Sequence[dict[str, float]], strategy: str) -> PlacementGroup:
    """All bundles, on as few nodes as hold them ("PACK") or as many ("SPREAD"). Raises
    `DoesNotFitError`."""
    (name, amount), *_ = bundles[0].items()
    there = sum(has.get(name, 0) for has in _alive())
    log.info("reserving %d times %g %ss of %g", len(bundles), amount, name, there)
    group = placement_group([*bundles], strategy=strategy)
    if not group.wait(_PLACE_TIMEOUT_S):
        remove_placement_group(group)
        free = ray.available_resources().get(name, 0)
        if name == "GPU":
            fewer = f"use --stages {int(free)}, " if free >= 1 else ""
            remedy = f"see `ray status` for who holds them, {fewer}add nodes, or use --kernels cpu"
        else:
            remedy = "use fewer --threads, or add nodes"
        raise DoesNotFitError(
            f"{len(bundles)} times {amount:g} {name}s found no place in {_PLACE_TIMEOUT_S:.0f} s: "
            f"{free:g} of {there:g} {name}s are free; {remedy}",
            max_context=0,
        )
    return group


def _end_the_silent(actors: Sequence[ActorHandle]) -> list[bool]:
    """Which actors answer, asked all at once; one that does not will not come back half-alive."""
    # Not just any call: an actor that failed to load is no use either, and refuses this one.
    asked = [actor.stats.remote() for actor in actors]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_PING_TIMEOUT_S)
    alive = [ref in answered and _succeeded(ref) for ref in asked]
    for actor, lives in zip(actors, alive, strict=True):
        if not lives:
            ray.kill(actor)
    return alive


def _succeeded(ref: ray.ObjectRef) -> bool:
    try:
        _get([ref], "looking for survivors")
    except PipelineError:
        return False
    return True


def _get(refs: Sequence[Any], doing: str, timeout_s: float = _CALL_TIMEOUT_S) -> list[Any]:
    with _ray_errors(doing):
        return list(ray.get(list(refs), timeout=timeout_s))


@contextlib.contextmanager
def _ray_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except RayActorError as error:
        raise PeerLostError(f"{doing}: a stage died: {error}") from error
    except GetTimeoutError as error:
        raise PeerLostError(f"{doing}: a stage does not answer") from error
    except RayTaskError as error:
        if isinstance(error.cause, LongspanError):
            raise error.cause from None
        raise StageError(f"{doing}: {error.cause!r}") from error
    except RayError as error:
        raise PeerLostError(f"{doing}: {error}") from error
