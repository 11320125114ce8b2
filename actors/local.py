"""Stages of this process, for `longspan generate`, benchmarks and tests: the same engine without
Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from actors.engine import ReadyPipeline
from actors.pipeline import LocalPipeline
from actors.scheduler import Limits
from actors.stats import StageStats
from sharding.batch import PAGE_SLOTS
from sharding.gguf.reader import GGUFFile
from sharding.model_plan import ModelPlan
from sharding.stage_spec import StageSpec

if TYPE_CHECKING:
    from sharding.stage import Stage


class LocalStages:
    """A `StageSource` of in-process stages."""

    def __init__(self, model: Path | GGUFFile, plan: ModelPlan, max_waiting: int = 256) -> None:
        self._model = model
        self._plan = plan
        self._max_waiting = max_waiting
        self._epoch = 0
        self.stages: list[Stage] = []

    def open(self, report: Callable[[float, str], None]) -> ReadyPipeline:
        """Load stage after stage."""
        self.stages.clear()
        if isinstance(self._model, GGUFFile):
            self._load(self._model, report)
        else:
            with GGUFFile.open(self._model) as file:
                self._load(file, report)
        return self._ready()

    def _ready(self) -> ReadyPipeline:
        limits = plan_limits(self._plan, self._max_waiting)
        return ReadyPipeline(LocalPipeline(self.stages), limits, self._epoch)

    def _load(self, file: GGUFFile, report: Callable[[float, str], None]) -> None:
        # Here, so that whoever only needs a plan does not wait for torch.
        from sharding.stage import Stage

        specs = stage_specs(str(file.paths[0]), self._plan)
        for number, spec in enumerate(specs):

            def share(done: float, number: int = number) -> None:
                report((number + done) / len(specs), f"loading stage {number} of {len(specs)}")

            self.stages.append(Stage(spec, file, share))

    def repair(self, report: Callable[[float, str], None]) -> ReadyPipeline:
        """Start afresh: nothing here dies alone, but a step may have failed half-way."""
        for stage in self.stages:
            stage.reset()
        self._epoch += 1
        return self._ready()

    def check(self) -> None:
        """Nothing to ask: these stages run on the thread that would ask."""

    def use_quiet(self) -> None:
        """Nothing to do."""

    def stats(self) -> list[StageStats]:
        """What each stage holds."""
        return [
            describe_stage(number, stage, "this process", stage.kernels.device.type, "memory")
            for number, stage in enumerate(self.stages)
        ]

    def close(self) -> None:
        """Let go of weights and KV."""
        self.stages.clear()


def stage_specs(model: str, planned: ModelPlan) -> list[StageSpec]:
    """One spec for each stage of a plan."""
    plan, pages = planned.plan, planned.plan.kv_tokens // PAGE_SLOTS
    return [
        StageSpec(
            model,
            stage.layers.start,
            stage.layers.stop,
            pages,
            planned.kernels,
            planned.stretch,
            plan.window_pages,
            planned.context,
        )
        for stage in plan.stages
    ]


def plan_limits(planned: ModelPlan, max_waiting: int, prefix_cache: bool = True) -> Limits:
    """What the scheduler may count on under a plan."""
    return Limits(
        context=planned.context,
        pages=planned.plan.kv_tokens // PAGE_SLOTS,
        in_flight=len(planned.plan.stages),
        max_waiting=max_waiting,
        chunk=planned.chunk,
        even_depth=planned.even_depth,
        window_pages=planned.plan.window_pages,
        ring=planned.plan.ring_pages,
        window=planned.plan.window,
        prefix_cache=prefix_cache,
    )


def describe_stage(number: int, stage: Stage, node: str, device: str, link: str) -> StageStats:
    """A stage's books."""
    return StageStats(
        stage=number,
        node=node,
        device=device,
        link=link,
        layers=(stage.spec.start, stage.spec.stop),
        weights_bytes=stage.weights_bytes,
        kv_bytes=stage.kv_bytes,
        kv_tokens=stage.spec.pages * PAGE_SLOTS,
        pages_used=stage.pages_used,
    )
