"""Placement's decisions where a GPU disappoints, with Ray's part forged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actors import placement
from actors.engine import ReadyPipeline
from actors.placement import PlacementConfig, RayStages
from actors.shares import Machine, NodeFacts, devices_of
from sharding.errors import (
    ConfigError,
    DoesNotFitError,
    PipelineError,
    StageError,
    UnavailableError,
    UnsupportedModelError,
)
from sharding.gguf.reader import GGUFFile
from sharding.kernels import DeviceFacts, cpu_kernels
from sharding.model_plan import Wanted, plan_model
from sharding.planner import Device
from sharding.stage_spec import StageSpec
from tests.tiny_gguf import tiny_model


class ForgedActor:
    """An actor whose GPU answers with an error; on a CPU all is well."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.facts = self  # as Ray's methods are called: actor.facts.remote(…)

    def remote(self, kernels: str) -> NodeFacts | Exception:
        """The answer that `_get` finds."""
        if kernels == "triton":
            return self._error
        return NodeFacts("a", "host a", DeviceFacts("cpu", "cpu", 1000))


def get(refs: list[object], doing: str) -> list[object]:
    """As `placement._get`, of answers that are there already."""
    for ref in refs:
        if isinstance(ref, Exception):
            raise ref
    return refs


class ForgedStages(RayStages):
    """Places nothing anywhere; keeps what was reserved."""

    def __init__(self, kernels: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(PlacementConfig(Path("none.gguf"), 2, Wanted(64, 64, kernels)))
        self.reserved: list[tuple[list[dict[str, float]], str]] = []
        self.held: list[bool] = []
        self.reported: list[str] = []
        self._error = error
        monkeypatch.setattr(placement, "built_for_gpus", lambda: True)
        monkeypatch.setattr(placement, "_machines", lambda: [Machine(8, 2)])
        monkeypatch.setattr(placement, "_reserve", lambda *asked: self.reserved.append(asked))
        monkeypatch.setattr(placement, "_get", get)
        monkeypatch.setattr(placement, "_end_the_silent", lambda actors: [True, False])

    def _start(self, stage: int) -> ForgedActor:
        return ForgedActor(self._error)

    def _release(self) -> None:
        self.held.append(bool(self._actors))

    def place(self) -> str:
        """The kernels that stages were started with."""
        return self._place(lambda share, detail: self.reported.append(detail))


def test_auto_computes_on_cpus_where_no_gpu_can_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Old cards in a machine must not be worse than none; but never in silence."""
    stages = ForgedStages("auto", ConfigError("Tesla K80 has 3.7"), monkeypatch)
    assert stages.place() == cpu_kernels()
    assert stages.reserved == [([{"GPU": 1}] * 2, "PACK"), ([{"CPU": 4}] * 2, "PACK")]
    assert "stages compute on CPUs: Tesla K80 has 3.7" in caplog.text
    assert "no GPU can be used: Tesla K80 has 3.7" in stages.reported[-1]
    assert stages.held == [
        False,
        False,
        True,
    ]  # the actors on GPUs were ended before others started


def test_a_gpu_that_was_asked_for_is_not_replaced_by_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ForgedStages("triton", ConfigError("Tesla K80 has 3.7"), monkeypatch)
    with pytest.raises(ConfigError, match="Tesla K80"):
        stages.place()


def test_auto_waits_for_a_gpu_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tries again after a `PipelineError`; a CPU would be slow as long as it runs."""
    stages = ForgedStages("auto", StageError("the GPU fails: busy"), monkeypatch)
    with pytest.raises(PipelineError, match="busy"):
        stages.place()


def test_auto_does_not_take_a_mixture_of_experts_from_a_gpu_to_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever has a GPU counts on it: the engine ends with what there is to do instead."""
    path = tmp_path / "mixture.gguf"
    path.write_bytes(tiny_model(experts=4))
    stages = ForgedStages("auto", ConfigError("not asked"), monkeypatch)
    stages._config = PlacementConfig(path, 1, Wanted(64, 64, "auto"))
    stages._facts = [NodeFacts("a", "host a", DeviceFacts("card", "GPU-1", 1 << 40))]
    monkeypatch.setattr(stages, "_start_all", lambda *asked: None)
    with pytest.raises(UnsupportedModelError, match="use --kernels cpu"):
        stages.open(lambda share, detail: None)


def test_what_stops_a_replacement_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes a `ConfigError` for final; a driver that is gone for a moment is not."""
    stages = ForgedStages("triton", ConfigError("no driver"), monkeypatch)
    stages._specs = [StageSpec("none.gguf", 0, 1, 4, "triton")] * 2
    stages._actors = [stages._start(stage) for stage in range(2)]
    stages._facts = [NodeFacts("a", "host a", DeviceFacts("card", "GPU-1", 1000))] * 2
    with pytest.raises(StageError, match=r"replacing stages \[1\]: no driver"):
        stages.repair(lambda share, detail: None)


class TwoNodes(ForgedStages):
    """As much memory on each node, and cores enough for all stages on the first."""

    def __init__(self, model: Path, usable_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("cpu", ConfigError("no GPU"), monkeypatch)
        self._config = PlacementConfig(model, 2, Wanted(64, 64, "cpu"))
        self.loaded: list[Device] = []
        self._usable_bytes = usable_bytes
        monkeypatch.setattr(placement, "_machines", lambda: [Machine(16), Machine(4)])
        monkeypatch.setattr(placement, "_alive", lambda: [{"CPU": 16.0}, {"CPU": 4.0}])

    def _ask_all(self, kernels: str) -> list[NodeFacts]:
        memory = DeviceFacts("cpu", "cpu", self._usable_bytes)
        nodes = "ab" if self.reserved[-1][1] == "SPREAD" else "aa"
        return [NodeFacts(node, f"host {node}", memory) for node in nodes]

    def _load(self, stages: Sequence[int], report: Callable[[float, str], None]) -> None:
        self.loaded = devices_of(self._facts)

    def _join(self, epoch: int) -> ReadyPipeline:
        raise StageError("nothing here to join")

    def try_to_open(self) -> None:
        """As far as forged stages come."""
        with pytest.raises(StageError, match="nothing here to join"):
            self.open(lambda share, detail: self.reported.append(detail))


def test_stages_move_to_more_nodes_where_one_has_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest node has cores for all of them, but the context needs the memory of both."""
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny_model(layers=2))
    with GGUFFile.open(model) as file:
        roomy = plan_model(file, [Device("node", 1 << 40)] * 2, Wanted(64, 64, "cpu"))
    need = max(stage.total_bytes for stage in roomy.plan.stages)
    packed = TwoNodes(model, 2 * need, monkeypatch)
    packed.try_to_open()
    assert packed.reserved == [([{"CPU": 8}] * 2, "PACK")]
    wide = TwoNodes(model, 2 * need - 2, monkeypatch)
    wide.try_to_open()
    assert wide.reserved == [([{"CPU": 8}] * 2, "PACK"), ([{"CPU": 4}] * 2, "SPREAD")]
    assert [device.name for device in wide.loaded] == ["cpu on host a", "cpu on host b"]
    assert "on more nodes, for their memory" in wide.reported[-1]
    with pytest.raises(DoesNotFitError):
        TwoNodes(model, need - 1, monkeypatch).open(lambda share, detail: None)


def test_closing_in_the_middle_of_a_repair_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With our own error: the engine's log shows a traceback for any other."""
    stages = ForgedStages("cpu", ConfigError("no GPU"), monkeypatch)
    stages._specs = [StageSpec("none.gguf", 0, 1, 4, "cpu")] * 2
    stages._actors = [stages._start(stage) for stage in range(2)]
    stages._facts = [NodeFacts("a", "host a", DeviceFacts("cpu", "cpu", 1000))] * 2

    def closing(actors: Sequence[object]) -> list[bool]:
        stages.close()
        return [True, False]

    monkeypatch.setattr(placement, "_end_the_silent", closing)
    with pytest.raises(UnavailableError, match="shutting down"):
        stages.repair(lambda share, detail: None)
