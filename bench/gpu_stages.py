"""A model of 7B in stages on GPUs, through Ray: what the borders of stages cost.

    python -m bench.gpu_stages [--stages 1,4] [--keep]       on one GPU, or as many as Ray finds
    TRITON_INTERPRET=1 python -m bench.gpu_stages --tiny      does it run? its times mean nothing

The model of `bench/gpu.py`. Each number of stages starts anew, on the same cluster: stage processes
as `longspan serve` starts them, asked past the engine by one sequence. Figures of a row:

    load_s      placing, loading and joining all stages
    prefill     tokens a second of a prompt that nearly fills the context, chunks of 4096 in flight
    decode      tokens a second after it, drawn greedily
    of_one      both over those of the first number of stages
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from actors.engine import ReadyPipeline
from actors.placement import PlacementConfig, RayStages
from bench.gpu import TINY, Size, write_model
from bench.report import Report
from serving.bench import BenchCase, Bencher
from serving.cluster import start_ray, stop_ray
from sharding.model_plan import Wanted

_RUNS = 3


def rates(ready: ReadyPipeline, size: Size, context: int) -> tuple[float, float]:
    """Prefill and decode, tokens a second."""
    bencher = Bencher(ready.pipeline, size.vocab, ready.limits)
    filled = context - size.decoded - 1
    prefill = bencher.run(BenchCase(0, prompt=filled), _RUNS)
    decode = bencher.run(BenchCase(filled, tokens=size.decoded), _RUNS)
    return prefill.tok_s, decode.tok_s


def main(
    stages: Annotated[str, typer.Option(help="Numbers of stages, one after the other.")] = "1,4",
    context: Annotated[int, typer.Option(help="Tokens of the sequence.")] = 2048,
    tiny: Annotated[bool, typer.Option(help="A tiny model, for the interpreter.")] = False,
    keep: Annotated[bool, typer.Option(help="Write results/gpu_stages.json.")] = False,
) -> None:
    """Write a model, run it in so many stages."""
    numbers = [int(part) for part in stages.split(",")]
    size = replace(TINY, layers=max(numbers)) if tiny else Size()
    if tiny:
        context = min(size.contexts)
        os.environ["RAY_OVERRIDE_RESOURCES"] = '{"GPU": 1}'  # Ray finds none, the interpreter does
    report = Report("gpu_stages", keep)
    start_ray(None)
    first: tuple[float, float] | None = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_model(path, size)
            for number in numbers:
                wanted = Wanted(context, context, "triton")
                begin = time.perf_counter()
                with closing(RayStages(PlacementConfig(path, number, wanted))) as source:
                    ready = source.open(lambda share, detail: None)
                    load_s = time.perf_counter() - begin
                    found = rates(ready, size, context)
                    devices = sorted({stage.device for stage in source.stats()})
                    ready.pipeline.close()
                first = first or found
                report.row(
                    test=f"{number} stages @ {context}", load_s=round(load_s, 2),
                    prefill=round(found[0], 1), decode=round(found[1], 1),
                    prefill_of_one=round(found[0] / first[0], 3),
                    decode_of_one=round(found[1] / first[1], 3), devices=", ".join(devices),
                )  # fmt: skip
    finally:
        stop_ray()


if __name__ == "__main__":
    typer.run(main)
