"""A stage whose GPU fails: its requests hear of it, and it stops working at once."""

from __future__ import annotations

import socket

import msgspec
import pytest
import torch

from actors.pipeline import ENVELOPE, Envelope, serve_stage
from actors.transport import Edge
from sharding.batch import Batch, Result, Segment
from sharding.errors import DeviceLostError, PeerLostError
from sharding.gguf.reader import GGUFFile
from sharding.stage import Stage
from tests.stages import load_stages, open_request
from tests.tiny_gguf import tiny_llama


def failing_stage(monkeypatch: pytest.MonkeyPatch, lost: bool) -> Stage:
    """A stage whose next batch fails as a GPU does, for good or for lack of memory."""
    (stage,) = load_stages(GGUFFile.from_bytes(tiny_llama(layers=1)), 1)
    open_request([stage], 1, [0])

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

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
    with pytest.raises(DeviceLostError, match="device failed"):
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
