"""What the pipeline adds to the stages' own time: decode steps of one request through Ray stages.

    python -m bench.step MODEL [--stages 2] [--depth 128] [--keep]

`overhead_ms` is the median over steps of wall time from sending a batch to having its result, less
the seconds that the stages say they computed. One request, so nothing overlaps: this is what every
token of a lone user pays.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import typer

from actors.pages import pages_for
from actors.pipeline import Pipeline
from actors.placement import PlacementConfig, RayStages
from actors.scheduler import Limits
from bench.report import Report
from serving.cluster import start_ray, stop_ray
from serving.fetch import resolve_model
from sharding.batch import Batch, Opened, Result, SamplingParams, Segment
from sharding.model_plan import Wanted

_WARM_UP = 10


def _step(pipeline: Pipeline, batch: Batch) -> Result:
    pipeline.send(batch)
    result = None
    while result is None:
        result = pipeline.receive(timeout_s=60)
    return result


def _decode(
    pipeline: Pipeline, limits: Limits, depth: int, steps: int
) -> tuple[list[float], list[float]]:
    """Wall seconds and stages' own seconds of each step."""
    pages = list(range(pages_for(depth + steps)))
    opened = Opened(1, pages, depth, SamplingParams(temperature=0.0), pages[: limits.ring])
    _step(pipeline, Batch(0, opened=[opened]))
    for start in range(0, depth, limits.chunk):
        tokens = [5] * min(limits.chunk, depth - start)
        _step(pipeline, Batch(1, segments=[Segment(1, start, tokens)]))
    wall, own = [], []
    for number in range(steps):
        batch = Batch(number + 2, segments=[Segment(1, depth + number, [5], sample=True)])
        begin = time.perf_counter()
        result = _step(pipeline, batch)
        wall.append(time.perf_counter() - begin)
        own.append(sum(result.stage_s))
    return wall[_WARM_UP:], own[_WARM_UP:]


def main(
    model: str,
    stages: int = 2,
    depth: int = 128,
    steps: int = 200,
    keep: Annotated[bool, typer.Option(help="Write results/step.json.")] = False,
) -> None:
    """Measure one model."""
    path = resolve_model(model)
    context = depth + steps + _WARM_UP
    report = Report("step", keep)
    start_ray(None)
    source = RayStages(PlacementConfig(path, stages, Wanted(context, context)))
    try:
        opened = source.open(lambda share, detail: None)
        wall, own = _decode(opened.pipeline, opened.limits, depth, steps + _WARM_UP)
        opened.pipeline.close()
    finally:
        source.close()
        stop_ray()
    report.row(
        test="decode step",
        model=path.name,
        stages=stages,
        depth=depth,
        wall_ms=round(statistics.median(wall) * 1e3, 3),
        stages_ms=round(statistics.median(own) * 1e3, 3),
        overhead_ms=round(
            statistics.median(w - o for w, o in zip(wall, own, strict=True)) * 1e3, 3
        ),
    )


if __name__ == "__main__":
    typer.run(main)
