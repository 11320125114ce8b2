"""Stage edges: hidden states and their meta part over one persistent socket, no pickle anywhere.

A frame is a fixed header (magic, version, kind, epoch, step, shapes), a msgspec-encoded meta part,
then the raw bytes of the hidden states, received into a buffer that is reused. A Unix socket joins
stages on one host, TCP without Nagle's delay joins hosts. End of file is the fastest sign that a
peer died. Not here: what the meta part means (`pipeline.py`).

    0      4     5     6      7    8      12    16    20          24    32             40
    magic  vers  kind  dtype  0    epoch  rows  cols  meta bytes  step  payload bytes

An edge belongs to one sender thread and one receiver thread; whoever opened it closes it.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from sharding.errors import PeerLostError, ProtocolError

HEADER = struct.Struct("<4sBBBxIIIIQQ")
MAGIC = b"LSPN"
VERSION = 1

HELLO = 1
"""The greeting that opens an edge; all other kinds belong to `pipeline.py`."""

_DTYPES = {0: None, 1: np.dtype(np.float32), 2: np.dtype(np.float16)}
_CODES = {None: 0, torch.float32: 1, torch.float16: 2}

# Beyond these no pipeline of ours sends anything: a stranger's bytes must not make us allocate.
_MOST_META_BYTES = 64 << 20
_MOST_PAYLOAD_BYTES = 1 << 30

_SOCKET_BUFFER_BYTES = 4 << 20
_HELLO_BYTES = 64
_HELLO_TIMEOUT_S = 1.0
# A peer that acknowledges nothing for so long is gone (a pulled cable sends no end of file).
_UNACKNOWLEDGED_MS = 10_000


class Address(msgspec.Struct, frozen=True):
    """Where an edge listens: a Unix socket's abstract name, or a host and a TCP port."""

    path: str | None = None
    host: str | None = None
    port: int = 0


@dataclass(frozen=True)
class Frame:
    """One message. `hidden` `[rows, cols]` is valid until the edge's next receive."""

    kind: int
    step: int
    meta: bytes
    hidden: torch.Tensor | None


class Edge:
    """One direction of the pipeline between two neighbours, tagged with the pipeline's epoch."""

    def __init__(self, sock: socket.socket, epoch: int) -> None:
        self.epoch = epoch
        self._sock = sock
        self._header = bytearray(HEADER.size)
        self._buffer = np.empty(0, dtype=np.uint8)
        _tune(sock)

    def fileno(self) -> int:
        """For `select`."""
        return self._sock.fileno()

    def send(self, kind: int, step: int, meta: bytes, hidden: torch.Tensor | None = None) -> None:
        """Send one frame; `hidden` is `[rows, cols]`, not empty. Raises `PeerLostError`."""
        rows, cols, payload = 0, 0, memoryview(b"")
        if hidden is not None:
            rows, cols = hidden.shape
            payload = hidden.contiguous().numpy().data.cast("B")
        code = _CODES[None if hidden is None else hidden.dtype]
        header = HEADER.pack(
            MAGIC, VERSION, kind, code, self.epoch, rows, cols, len(meta), step, payload.nbytes
        )
        with _lost_peer("sending"):
            _send_all(self._sock, [memoryview(header), memoryview(meta), payload])

    def receive(self, most_bytes: int = _MOST_PAYLOAD_BYTES) -> Frame:
        """Wait for a frame. Raises `PeerLostError` at the end, `ProtocolError` if it is none."""
        self._fill(memoryview(self._header))
        magic, version, kind, code, epoch, rows, cols, meta_bytes, step, payload_bytes = (
            HEADER.unpack(self._header)
        )
        if magic != MAGIC or version != VERSION or code not in _DTYPES:
            raise ProtocolError(f"a frame begins with {bytes(self._header[:8])!r}")
        if epoch != self.epoch:
            raise ProtocolError(f"a frame of epoch {epoch} on an edge of epoch {self.epoch}")
        dtype = _DTYPES[code]
        expected = rows * cols * (dtype.itemsize if dtype else 0)
        if payload_bytes != expected or payload_bytes > most_bytes:
            raise ProtocolError(f"{payload_bytes} bytes announced for [{rows}, {cols}] {dtype}")
        if meta_bytes > min(most_bytes, _MOST_META_BYTES):
            raise ProtocolError(f"a meta part of {meta_bytes} bytes")
        meta = bytearray(meta_bytes)
        self._fill(memoryview(meta))
        hidden = None if dtype is None else self._tensor(rows, cols, dtype, payload_bytes)
        return Frame(kind, step, bytes(meta), hidden)

    def _tensor(
        self, rows: int, cols: int, dtype: np.dtype[np.floating], n_bytes: int
    ) -> torch.Tensor:
        if self._buffer.nbytes < n_bytes:
            # torch aligns its memory to cache lines, which GEMMs downstream like.
            self._buffer = torch.empty(n_bytes, dtype=torch.uint8).numpy()
        used = self._buffer[:n_bytes]
        self._fill(used.data)
        return torch.from_numpy(used.view(dtype).reshape(rows, cols))

    def _fill(self, view: memoryview) -> None:
        with _lost_peer("receiving"):
            while view:
                count = self._sock.recv_into(view)
                if count == 0:
                    raise PeerLostError("the neighbour closed the edge")
                view = view[count:]

    def close(self) -> None:
        """End the edge; the neighbour, and a receive that waits here, see end of file."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Listener:
    """Waits for the one neighbour that knows the secret."""

    def __init__(self, host: str | None) -> None:
        """Listen on a Unix socket, or with `host` on a free TCP port of that address."""
        if host is None:
            # Linux's abstract names leave no file behind, not even after a SIGKILL.
            path = f"\0longspan-{secrets.token_hex(16)}"
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.bind(path)
            self.address = Address(path=path)
        else:
            with _lost_peer(f"listening at {host}"):
                self._sock = socket.create_server((host, 0))
            self.address = Address(host=host, port=self._sock.getsockname()[1])
        self._sock.listen(8)

    def accept(self, secret: bytes, epoch: int, timeout_s: float) -> Edge:
        """The neighbour's edge; strangers are turned away. `PeerLostError` after the timeout."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left_s)
            with _lost_peer("waiting for a neighbour"):
                sock, _ = self._sock.accept()
            edge = Edge(sock, epoch)
            if _knows(edge, sock, secret):
                return edge
            edge.close()
        raise PeerLostError("waiting for a neighbour: only strangers came")

    def close(self) -> None:
        """Stop listening, also in the midst of `accept`; edges live on."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def connect(address: Address, secret: bytes, epoch: int, timeout_s: float = 10.0) -> Edge:
    """Open an edge to a listener. Raises `PeerLostError`."""
    where = repr(address.path) if address.path else f"{address.host}:{address.port}"
    family = socket.AF_INET if address.path is None else socket.AF_UNIX
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect((address.host, address.port) if address.path is None else address.path)
    except OSError as error:
        sock.close()
        raise PeerLostError(f"connecting to {where}: {error}") from error
    sock.settimeout(None)
    edge = Edge(sock, epoch)
    try:
        edge.send(HELLO, 0, secret)
    except PeerLostError:
        edge.close()
        raise
    return edge


def _knows(edge: Edge, sock: socket.socket, secret: bytes) -> bool:
    sock.settimeout(_HELLO_TIMEOUT_S)
    try:
        hello = edge.receive(_HELLO_BYTES)
    except (PeerLostError, ProtocolError):
        return False
    sock.settimeout(None)
    return hello.kind == HELLO and hmac.compare_digest(hello.meta, secret)


def _tune(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 1)):
            sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


def _send_all(sock: socket.socket, parts: list[memoryview]) -> None:
    parts = [part for part in parts if part.nbytes]
    while parts:
        sent = sock.sendmsg(parts)
        while parts and sent >= parts[0].nbytes:
            sent -= parts.pop(0).nbytes
        if parts:
            parts[0] = parts[0][sent:]


@contextlib.contextmanager
def _lost_peer(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PeerLostError(f"{doing}: {error}") from error
