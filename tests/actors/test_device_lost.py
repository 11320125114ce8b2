"""A stage whose GPU fails: its requests hear of it, it stops working at once, and nobody takes it
for a survivor."""

from __future__ import annotations

import os
import socket
import threading
import time

import msgspec
import pytest
import torch

from actors import stage_actor
from actors.pipeline import ENVELOPE, Envelope, serve_stage
from actors.stage_actor import StageActor
from actors.transport import Edge
from sharding.batch import Batch, Opened, Result, SamplingParams, Segment
from sharding.errors import DeviceLostError, PeerLostError, StageError
from sharding.gguf.reader import GGUFFile
from sharding.stage import Stage
from tests.stages import load_stages, open_request
from tests.tiny_gguf import tiny_model


def failing_stage(
    monkeypatch: pytest.MonkeyPatch, lost: bool, error: type[Exception] = RuntimeError
) -> Stage:
    """A stage whose next batch fails as a GPU does, for good or for lack of memory."""
    (stage,) = load_stages(GGUFFile.from_bytes(tiny_model(layers=1)), 1)
    open_request([stage], 1, [0])

    def fail(*_: object) -> torch.Tensor:
        raise error("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stage._layers, "run", fail)
    monkeypatch.setattr(stage.kernels, "works", lambda: not lost)
    return stage


def send(edge: Edge, step: int) -> None:
    """A batch of one token of request 1."""
    batch = Batch(step, segments=[Segment(1, 0, [3], sample=True)])
    edge.send(ENVELOPE, step, msgspec.msgpack.encode(Envelope(batch)))


def result(edge: Edge) -> Result:
    """The next result."""
    return msgspec.msgpack.decode(edge.receive().meta, type=Result)


def edges() -> tuple[Edge, Edge, Edge, Edge]:
    """A stage's two edges between the outer ends."""
    front, upstream = socket.socketpair()
    downstream, back = socket.socketpair()
    return Edge(front, 0), Edge(upstream, 0), Edge(downstream, 0), Edge(back, 0)


def test_a_lost_device_ends_the_stage_after_its_requests_were_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = failing_stage(monkeypatch, lost=True)
    front, upstream, downstream, back = edges()
    send(front, 1)
    with pytest.raises(DeviceLostError, match="device failed: .* illegal memory access"):
        serve_stage(stage, upstream, downstream)
    assert "illegal memory access" in str(result(back).error)
    with pytest.raises(PeerLostError):
        back.receive()
    front.close()
    back.close()


def test_a_batch_that_fails_alone_leaves_the_stage_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = failing_stage(monkeypatch, lost=False)
    front, upstream, downstream, back = edges()
    send(front, 1)
    send(front, 2)
    front.close()
    with pytest.raises(PeerLostError):  # the end of its work, not of the device
        serve_stage(stage, upstream, downstream)
    assert [result(back).step, result(back).step] == [1, 2]
    back.close()


def test_a_lost_device_is_told_apart_also_when_the_neighbour_is_gone_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPUs of a node often fail together: then nobody is there to send the failure to."""
    stage = failing_stage(monkeypatch, lost=True)
    front, upstream, downstream, back = edges()
    send(front, 1)
    back.close()
    with pytest.raises(DeviceLostError, match="device failed"):
        serve_stage(stage, upstream, downstream)
    front.close()


@pytest.mark.parametrize("how", ["noticed", "not noticed", "hangs", "computes for ever"])
def test_a_process_with_a_lost_device_does_not_join_again(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nor one whose device failed while it had no batch, or does not answer, or whose last batch
    never ends."""

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(stage_actor, "JOIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(stage_actor, "_DEVICE_TIMEOUT_S", 0.1)
    never = threading.Event()
    actor = StageActor()
    actor._stage = failing_stage(monkeypatch, lost=how == "not noticed")
    actor._stage.lost = how == "noticed"
    if how == "hangs":
        monkeypatch.setattr(actor._stage.kernels, "works", lambda: never.wait(30))
    elif how == "computes for ever":
        actor._worker = threading.Thread(target=never.wait, args=(30,))
        actor._worker.start()
    with pytest.raises(SystemExit, match="1"):
        actor.listen(over_tcp=False)
    never.set()


def test_a_survivor_joins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = StageActor()
    actor._stage = failing_stage(monkeypatch, lost=False)
    first = actor.listen(over_tcp=False)
    assert actor.listen(over_tcp=False) != first
    actor._leave()


def test_a_step_that_is_long_by_nature_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models on CPUs: a neighbour's death must not cost the healthy stages too."""
    monkeypatch.setattr(stage_actor, "JOIN_TIMEOUT_S", 0.05)
    actor = StageActor()
    front, upstream, downstream, back = edges()
    stage = failing_stage(monkeypatch, lost=False)

    def slow(*_: object) -> torch.Tensor:
        time.sleep(0.4)
        return torch.zeros(1, 64)

    monkeypatch.setattr(stage._layers, "run", slow)
    send(front, 1)
    front.close()
    with pytest.raises(PeerLostError):
        serve_stage(stage, upstream, downstream, actor._note_step)
    back.close()
    actor._worker = threading.Thread(target=time.sleep, args=(0.6,))
    actor._worker.start()
    actor._leave()
    assert not actor._worker.is_alive()


class CompilerError(Exception):
    """As Triton's: not one of Python's runtime errors."""


def test_what_a_kernel_set_calls_a_failure_costs_the_batch_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = failing_stage(monkeypatch, lost=False, error=CompilerError)
    batch = Batch(1, segments=[Segment(1, 0, [3], sample=True)])
    with pytest.raises(CompilerError):  # a bug of ours, as far as this set knows
        stage.forward(batch, None)
    monkeypatch.setattr(stage.kernels, "failures", (CompilerError,))
    with pytest.raises(StageError, match="CompilerError: CUDA error"):
        stage.forward(batch, None)
    assert not stage.lost


def test_no_memory_for_a_history_costs_the_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is memory that may be short; openings and closings take effect even then."""
    (stage,) = load_stages(GGUFFile.from_bytes(tiny_model(layers=1)), 1)
    opened = Opened(7, [0, 1], 1, SamplingParams(repetition_penalty=1.1, seed=3))

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")

    batch = Batch(1, opened=[opened], segments=[Segment(7, 0, [3], sample=True)])
    with monkeypatch.context() as patch, pytest.raises(StageError, match="out of memory"):
        patch.setattr(torch, "zeros", fail)
        stage.forward(batch, None)
    assert stage.pages_used == 2
    output = stage.forward(Batch(2, segments=batch.segments), None)
    assert output.segments[0].drawn is not None
    stage.forward(Batch(3, closed=[7]), None)
    assert stage.pages_used == 0
