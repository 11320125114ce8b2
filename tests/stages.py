"""Runs stages by hand, past the engine, to look at their logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import count, pairwise
from typing import TYPE_CHECKING

import torch

from actors.engine import Engine
from actors.local import LocalStages
from actors.request import Event, GenerateRequest
from sharding.batch import Batch, Opened, SamplingParams, Segment
from sharding.gguf.reader import GGUFFile
from sharding.model.arch import read_shape
from sharding.model.rotation import Stretch
from sharding.model_plan import Wanted, plan_model
from sharding.planner import Device
from sharding.stage import Stage
from sharding.stage_spec import StageSpec

if TYPE_CHECKING:
    from actors.grammar import Grammars

GREEDY = SamplingParams(temperature=0.0)
_steps = count()


def load_stages(
    file: GGUFFile,
    stages: int,
    pages: int = 64,
    kernels: str = "cpu",
    stretch: Stretch | None = None,
    context: int = 256,
) -> list[Stage]:
    """The model in so many stages of about equally many layers."""
    layers = read_shape(file.metadata).layers
    borders = [layers * number // stages for number in range(stages + 1)]
    name = str(file.paths[0])
    return [
        Stage(StageSpec(name, *border, pages, kernels, stretch, pages, context), file)
        for border in pairwise(borders)
    ]


def open_request(
    stages: Sequence[Stage], request: int, pages: Sequence[int], ring: int | None = None
) -> None:
    """Give a request its pages on every stage; in layers with a window as many, or `ring`."""
    window_pages = list(pages)[:ring]
    batch = Batch(next(_steps), opened=[Opened(request, list(pages), 1, GREEDY, window_pages)])
    for stage in stages:
        stage.forward(batch, None)


def logits(stages: Sequence[Stage], segments: list[Segment]) -> torch.Tensor:
    """Logits `[T, V]` of every row of one batch."""
    batch = Batch(next(_steps), segments=segments)
    hidden = None
    for stage in stages:
        hidden = stage.hidden(batch, hidden)
    assert hidden is not None, "no stages"
    return stages[-1].logits(hidden)


def chunked_logits(
    stages: Sequence[Stage],
    tokens: list[int],
    chunk: int,
    request: int = 1,
    page: int = 0,
    ring: int | None = None,
) -> torch.Tensor:
    """Logits `[T, V]` of a prompt that enters in chunks, in pages from number `page` on."""
    open_request(stages, request, range(page, page + len(tokens) // 16 + 1), ring)
    found = [
        logits(stages, [Segment(request, start, tokens[start : start + chunk])])
        for start in range(0, len(tokens), chunk)
    ]
    return torch.cat(found)


def local_engine(
    file: GGUFFile, stages: int = 2, context: int = 256, kv: int = 2048, chunk: int | None = None
) -> Engine:
    """A started engine over stages of this process."""
    devices = [Device(f"part {number}", 1 << 40) for number in range(stages)]
    planned = plan_model(file, devices, Wanted(context, kv, chunk=chunk))
    engine = Engine(LocalStages(file, planned), grammars_of(file))
    engine.start()
    engine.wait_ready()
    return engine


def grammars_of(file: GGUFFile) -> Grammars | None:
    """Over a file's vocabulary; None where there is no library for them, as where GPUs are
    tested."""
    if find_spec("llguidance") is None:
        return None
    from actors.grammar import Grammars
    from sharding.gguf.tokenizer import Tokenizer

    return Grammars(lambda: Tokenizer.from_metadata(file.metadata))


def tokens_of(events: Sequence[Event]) -> list[int]:
    """All tokens that a request drew."""
    return [choice.token for event in events for choice in event.tokens]


def generate(engine: Engine, request: GenerateRequest) -> list[int]:
    """Run one request to its end."""
    return tokens_of(list(engine.generate(request)))


def wait_until(done: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Poll until something is true; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
