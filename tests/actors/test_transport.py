"""Stage edges: what is sent arrives, what a stranger sends does no harm, a dead peer is noticed."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.pipeline import RESULT, SocketPipeline
from actors.transport import HEADER, Edge, Listener, connect
from sharding.batch import Batch, Result
from sharding.errors import PeerLostError, ProtocolError

SECRET = b"s" * 32


def edge_pair(epoch: int = 0) -> tuple[Edge, Edge]:
    """Two joined edges: what is sent on one is received on the other."""
    left, right = socket.socketpair()
    return Edge(left, epoch), Edge(right, epoch)


@contextlib.contextmanager
def joined(epoch: int = 0) -> Iterator[tuple[Edge, Edge]]:
    """Two edges that are closed at the end."""
    left, right = edge_pair(epoch)
    try:
        yield left, right
    finally:
        left.close()
        right.close()


def test_neighbours_meet_on_addresses_of_either_kind() -> None:
    for host in ("127.0.0.1", "::1"):
        with contextlib.closing(Listener(host)) as listener:
            caller = connect(listener.address, SECRET, 3)
            with contextlib.closing(listener.accept(SECRET, 3, 5.0)) as edge:
                caller.send(2, 9, b"x")
                assert edge.receive().meta == b"x"
            caller.close()


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    half=st.booleans(),
    meta=st.binary(max_size=2000),
)
def test_frames_arrive_as_they_were_sent(rows: int, cols: int, half: bool, meta: bytes) -> None:
    hidden = torch.randn(rows, cols, dtype=torch.float16 if half else torch.float32)
    with joined() as (left, right):
        left.send(2, 9, meta, hidden)
        left.send(3, 10, b"", None)
        frame = right.receive()
        assert (frame.kind, frame.step, frame.meta) == (2, 9, meta)
        assert frame.hidden is not None
        assert torch.equal(frame.hidden, hidden)
        assert right.receive().hidden is None


def test_a_frame_larger_than_the_socket_buffer_arrives_whole() -> None:
    hidden = torch.randn(512, 8192)
    with joined() as (left, right):
        sender = threading.Thread(target=left.send, args=(2, 1, b"meta", hidden))
        sender.start()
        frame = right.receive()
        sender.join()
        assert frame.hidden is not None
        assert torch.equal(frame.hidden, hidden)


def test_frames_that_came_together_are_received_one_by_one() -> None:
    """Of any size: a read takes what is there, a frame's end or not."""
    sizes = [1, 700, 3, 40000, 1, 2, 300, 50000, 1]
    states = [torch.full((1, size), float(size)) for size in sizes]
    with joined() as (left, right):
        for step, hidden in enumerate(states):
            left.send(2, step, bytes(step), hidden)
        for step, hidden in enumerate(states):
            frame = right.receive()
            assert (frame.step, frame.meta) == (step, bytes(step))
            assert frame.hidden is not None
            assert torch.equal(frame.hidden, hidden)
        assert not right.pending


def test_results_that_came_together_are_all_received() -> None:
    """The second is no longer in the socket, where a wait would look for it."""
    with joined() as (front, _), joined() as (last_stage, back):
        pipeline = SocketPipeline(front, back, 2)
        for step in range(3):
            last_stage.send(RESULT, step, msgspec.msgpack.encode(Result(step)))
        found = [pipeline.receive(timeout_s=10) for _ in range(3)]
        assert [result.step for result in found if result is not None] == [0, 1, 2]
        assert pipeline.receive(timeout_s=0) is None
        pipeline.close()


@pytest.mark.parametrize("noticed_by", ["send", "receive"])
def test_the_last_words_of_a_first_stage_that_died_are_heard(noticed_by: str) -> None:
    """Its end is seen at the front before what it still sent comes out at the back."""
    with joined() as (front, first_stage), joined() as (last_stage, back):
        pipeline = SocketPipeline(front, back, 2)
        first_stage.close()
        if noticed_by == "receive":
            assert pipeline.receive(timeout_s=10) is None
        pipeline.send(Batch(2))
        pipeline.wake()
        told = Result(1, error="CUDA error: an illegal memory access")
        last_stage.send(RESULT, 1, msgspec.msgpack.encode(told))
        assert pipeline.receive(timeout_s=10) == told
        last_stage.close()
        with pytest.raises(PeerLostError):
            pipeline.receive(timeout_s=10)
        pipeline.close()


def test_a_first_stage_that_died_without_a_word_is_noticed() -> None:
    """Also when the others cannot tell: one of them computes, or hangs."""
    with joined() as (front, first_stage), joined() as (_, back):
        pipeline = SocketPipeline(front, back, 2)
        first_stage.close()
        assert pipeline.receive(timeout_s=10) is None
        begin = time.monotonic()
        with pytest.raises(PeerLostError, match="closed the edge"):
            pipeline.receive(timeout_s=30)
        assert time.monotonic() - begin < 2
        pipeline.close()


def test_a_tensor_that_is_sent_again_has_its_new_numbers() -> None:
    whole = torch.zeros(4, 4)
    with joined() as (left, right):
        for hidden in (whole, whole.t(), whole[:, 1:3], whole):
            for value in (1.0, 2.0):
                whole.copy_(torch.arange(16.0).view(4, 4) * value)
                left.send(2, 1, b"", hidden)
                frame = right.receive()
                assert frame.hidden is not None
                assert torch.equal(frame.hidden, hidden)


def test_received_states_are_aligned_like_any_other_tensor() -> None:
    """A GEMM may round differently on unaligned input; then stages would not be exact."""
    with joined() as (left, right):
        left.send(2, 1, b"odd", torch.ones(3, 5))
        frame = right.receive()
        assert frame.hidden is not None
        assert frame.hidden.data_ptr() % 64 == 0


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_a_neighbour_with_the_secret_is_let_in_and_a_stranger_is_not(host: str | None) -> None:
    listener = Listener(host)
    assert listener.address.link == ("Unix socket" if host is None else "TCP")
    stranger = connect(listener.address, b"wrong", epoch=4)
    neighbour = connect(listener.address, SECRET, epoch=4)
    accepted = listener.accept(SECRET, 4, timeout_s=10)
    neighbour.send(2, 5, b"hello")
    assert accepted.receive().meta == b"hello"
    with pytest.raises(PeerLostError):
        stranger.receive()
    for edge in (stranger, neighbour, accepted):
        edge.close()
    listener.close()


def test_nobody_comes() -> None:
    listener = Listener(None)
    with pytest.raises(PeerLostError, match="waiting for a neighbour"):
        listener.accept(SECRET, 0, timeout_s=0.05)
    listener.close()


def test_a_listener_that_was_closed_before_its_wait_says_so() -> None:
    """The stage's thread may come to wait only after the stage has left the epoch."""
    listener = Listener(None)
    listener.close()
    with pytest.raises(PeerLostError, match="waiting for a neighbour"):
        listener.accept(SECRET, 0, timeout_s=60)


def test_closing_a_listener_ends_its_wait() -> None:
    """A stage that leaves an epoch must not wait out the whole time for a neighbour that died."""
    listener = Listener(None)
    failures: list[PeerLostError] = []

    def wait() -> None:
        try:
            listener.accept(SECRET, 0, timeout_s=60)
        except PeerLostError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    listener.close()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert len(failures) == 1


def test_a_stranger_cannot_make_the_listener_allocate() -> None:
    listener = Listener(None)
    stranger = connect(listener.address, b"x" * 65, 0)
    with pytest.raises(PeerLostError):
        listener.accept(SECRET, 0, timeout_s=0.3)
    stranger.close()
    listener.close()


def test_nobody_listens() -> None:
    listener = Listener(None)
    address = listener.address
    listener.close()
    with pytest.raises(PeerLostError, match="connecting"):
        connect(address, SECRET, 0)


def test_a_frame_of_an_old_epoch_is_refused() -> None:
    """After a repair a late frame of the old pipeline must not be taken for a new one."""
    left, right = edge_pair(epoch=3)
    right.epoch = 4
    left.send(2, 1, b"late")
    with pytest.raises(ProtocolError, match="epoch 3 on an edge of epoch 4"):
        right.receive()
    left.close()
    right.close()


def test_a_closed_peer_is_a_lost_peer() -> None:
    with joined() as (left, right):
        left.close()
        with pytest.raises(PeerLostError):
            right.receive()
        with pytest.raises(PeerLostError):
            for _ in range(100):
                right.send(2, 1, b"x", torch.zeros(512, 512))


def test_a_peer_that_dies_in_mid_frame_is_a_lost_peer() -> None:
    raw, other = socket.socketpair()
    edge = Edge(other, 0)
    raw.sendall(b"LSPN\x02\x02")
    raw.close()
    with pytest.raises(PeerLostError, match="closed"):
        edge.receive()
    edge.close()


HOSTILE = {
    "no magic": (b"HTTP", 1, 2, 1, 0, 1, 1, 0, 0, 4),
    "another version": (b"LSPN", 9, 2, 1, 0, 1, 1, 0, 0, 4),
    "unknown type": (b"LSPN", 2, 2, 77, 0, 1, 1, 0, 0, 4),
    "a payload that contradicts its shape": (b"LSPN", 2, 2, 1, 0, 2, 2, 0, 0, 1 << 40),
    "a payload of terabytes": (b"LSPN", 2, 2, 1, 0, 1 << 30, 1 << 30, 0, 0, 1 << 62),
    "a meta part of gigabytes": (b"LSPN", 2, 2, 0, 0, 0, 0, 1 << 31, 0, 0),
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_strange_bytes_are_refused_before_anything_is_allocated(fields: tuple[object, ...]) -> None:
    raw, other = socket.socketpair()
    edge = Edge(other, 0)
    raw.sendall(HEADER.pack(*fields))
    with pytest.raises(ProtocolError):
        edge.receive()
    edge.close()
    raw.close()


@settings(max_examples=200)
@given(st.binary(min_size=HEADER.size, max_size=HEADER.size + 64))
def test_random_bytes_end_in_one_of_our_errors(noise: bytes) -> None:
    raw, other = socket.socketpair()
    edge = Edge(other, 0)
    raw.sendall(noise)
    raw.close()
    with pytest.raises((ProtocolError, PeerLostError)):
        while True:
            edge.receive()
    edge.close()


def test_the_header_has_the_size_that_its_drawing_shows() -> None:
    assert HEADER.size == 40
    assert struct.calcsize(HEADER.format) == HEADER.size
