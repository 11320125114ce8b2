"""Placement's decisions where a GPU disappoints, with Ray's part forged."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import placement
from actors.placement import PlacementConfig, RayStages
from actors.shares import Machine, NodeFacts
from sharding.errors import ConfigError, PipelineError, StageError
from sharding.kernels import DeviceFacts, cpu_kernels
from sharding.model_plan import Wanted
from sharding.stage_spec import StageSpec


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
        self.reserved: list[list[dict[str, float]]] = []
        self.held: list[bool] = []
        self.reported: list[str] = []
        self._error = error
        monkeypatch.setattr(placement, "built_for_gpus", lambda: True)
        monkeypatch.setattr(placement, "_machines", lambda: [Machine(8, 2)])
        monkeypatch.setattr(placement, "_reserve", self.reserved.append)
        monkeypatch.setattr(placement, "_get", get)
        monkeypatch.setattr(placement, "_end_the_silent", lambda actors: [True, False])

    def _start(self, stage: int) -> ForgedActor:
        return ForgedActor(self._error)

    def _release(self) -> None:
        self.held.append(bool(self._actors))
        self._actors = []

    def place(self) -> str:
        """The kernels that stages were started with."""
        return self._place(lambda share, detail: self.reported.append(detail))


def test_auto_computes_on_cpus_where_no_gpu_can_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Old cards in a machine must not be worse than none; but never in silence."""
    stages = ForgedStages("auto", ConfigError("Tesla K80 has 3.7"), monkeypatch)
    assert stages.place() == cpu_kernels()
    assert stages.reserved == [[{"GPU": 1}] * 2, [{"CPU": 4}] * 2]
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


def test_what_stops_a_replacement_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes a `ConfigError` for final; a driver that is gone for a moment is not."""
    stages = ForgedStages("triton", ConfigError("no driver"), monkeypatch)
    stages._specs = [StageSpec("none.gguf", 0, 1, 4, "triton")] * 2
    stages._actors = [stages._start(stage) for stage in range(2)]
    stages._facts = [NodeFacts("a", "host a", DeviceFacts("card", "GPU-1", 1000))] * 2
    with pytest.raises(StageError, match=r"replacing stages \[1\]: no driver"):
        stages.repair(lambda share, detail: None)
