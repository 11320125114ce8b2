"""Stage edges: hidden states and their meta part over one persistent socket, no pickle anywhere.

A frame is a fixed header (magic, version, kind, epoch, step, shapes), a msgspec-encoded meta part,
zeros up to a multiple of 64 bytes if hidden states follow, then their raw bytes, received into a
buffer that is reused. A Unix socket joins stages on one host, TCP without Nagle's delay joins
hosts. End of file is the fastest sign that a peer died. Not here: what the meta part means
(`pipeline.py`).

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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch

from sharding.errors import PeerLostError, ProtocolError

HEADER = struct.Struct("<4sBBBxIIIIQQ")
MAGIC = b"LSPN"
VERSION = 2

HELLO = 1
"""The greeting that opens an edge; all other kinds belong to `pipeline.py`."""

_DTYPES = {0: None, 1: torch.float32, 2: torch.float16}
_CODES = {torch.float32: 1, torch.float16: 2}
_Shape = tuple[int, int, int]  # code of the type, rows, columns
_NOTHING: tuple[_Shape, memoryview] = (0, 0, 0), memoryview(b"")
_ALIGNMENT = 64

# Beyond these no pipeline of ours sends anything: a stranger's bytes must not make us allocate.
_MOST_META_BYTES = 64 << 20
_MOST_PAYLOAD_BYTES = 1 << 30

_SOCKET_BUFFER_BYTES = 4 << 20
_INBOX_BYTES = 64 << 10
_HELLO_BYTES = 64
_HELLO_TIMEOUT_S = 1.0
# A peer that acknowledges nothing for so long is gone (a pulled cable sends no end of file).
_UNACKNOWLEDGED_MS = 10_000


class Address(msgspec.Struct, frozen=True):
    """Where an edge listens: a Unix socket's abstract name, or a host and a TCP port."""

    path: str | None = None
    host: str | None = None
    port: int = 0

    @property
    def link(self) -> str:
        """What an edge to there goes by, for people."""
        return "TCP" if self.path is None else "Unix socket"


class Frame(NamedTuple):
    """One message. `hidden` `[rows, cols]` is the receiver's to change until its next receive."""

    kind: int
    step: int
    meta: bytes
    hidden: torch.Tensor | None


class Edge:
    """One direction of the pipeline between two neighbours, tagged with the pipeline's epoch.

    A decoded token pays for every step here on every hop, and finds the code gone from the caches,
    since the weights went through them: hence one system call a frame where it is small, and no
    tensor or view that the frame before had already.
    """

    def __init__(self, sock: socket.socket, epoch: int) -> None:
        self.epoch = epoch
        self._sock = sock
        self._inbox = _aligned(_INBOX_BYTES)
        self._filled = self._used = 0
        self._hidden: tuple[tuple[int, int, int, int], torch.Tensor] | None = None
        self._sent: tuple[torch.Tensor, tuple[_Shape, memoryview]] | None = None
        _tune(sock)

    def fileno(self) -> int:
        """For `select`, when nothing is `pending`."""
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """Whether more than the last frame has been read from the socket."""
        return self._filled > self._used

    def send(self, kind: int, step: int, meta: bytes, hidden: torch.Tensor | None = None) -> None:
        """Send one frame; `hidden` is `[rows, cols]`, not empty. Raises `PeerLostError`."""
        (code, rows, cols), payload = self._payload(hidden)
        header = HEADER.pack(
            MAGIC, VERSION, kind, code, self.epoch, rows, cols, len(meta), step, len(payload)
        )
        head = header + meta
        if code:
            head = head.ljust(_payload_offset(len(meta)), b"\0")
        parts = (head, payload) if code else (head,)
        try:
            sent = self._sock.sendmsg(parts)
            if sent < len(head) + len(payload):
                _send_rest(self._sock, parts, sent)
        except OSError as error:
            raise PeerLostError(f"sending: {error}") from error

    def _payload(self, hidden: torch.Tensor | None) -> tuple[_Shape, memoryview]:
        """Its shape and bytes; the last view again, if it is the same tensor."""
        if hidden is None:
            return _NOTHING
        if self._sent is None or self._sent[0] is not hidden:
            rows, cols = hidden.shape
            payload = hidden.contiguous().numpy().data.cast("B")
            described = (_CODES[hidden.dtype], rows, cols), payload
            if not hidden.is_contiguous():
                return described  # of a copy
            self._sent = hidden, described
        return self._sent[1]

    def receive(self, most_bytes: int = _MOST_PAYLOAD_BYTES) -> Frame:
        """Wait for a frame. Raises `PeerLostError` at the end, `ProtocolError` if it is none."""
        self._drop_last()
        self._fill(HEADER.size)
        magic, version, kind, code, epoch, rows, cols, meta_bytes, step, payload_bytes = (
            HEADER.unpack_from(self._inbox)
        )
        if magic != MAGIC or version != VERSION or code not in _DTYPES:
            raise ProtocolError(f"a frame begins with {bytes(self._inbox[:8])!r}")
        if epoch != self.epoch:
            raise ProtocolError(f"a frame of epoch {epoch} on an edge of epoch {self.epoch}")
        dtype = _DTYPES[code]
        if payload_bytes != rows * cols * (dtype.itemsize if dtype else 0) or (
            payload_bytes > most_bytes
        ):
            raise ProtocolError(f"{payload_bytes} bytes announced for [{rows}, {cols}] {dtype}")
        if meta_bytes > min(most_bytes, _MOST_META_BYTES):
            raise ProtocolError(f"a meta part of {meta_bytes} bytes")
        payload = HEADER.size + meta_bytes if dtype is None else _payload_offset(meta_bytes)
        self._fill(payload + payload_bytes)
        self._used = payload + payload_bytes
        meta = bytes(self._inbox[HEADER.size : HEADER.size + meta_bytes])
        hidden = None if dtype is None else self._tensor(payload, code, rows, cols)
        return Frame(kind, step, meta, hidden)

    def _tensor(self, offset: int, code: int, rows: int, cols: int) -> torch.Tensor:
        """A view of the inbox; the last one again, if it has the same shape at the same place."""
        shape = (offset, code, rows, cols)
        if self._hidden is None or self._hidden[0] != shape:
            dtype = _DTYPES[code]
            assert dtype is not None, "checked by the caller"
            flat = torch.frombuffer(self._inbox, dtype=dtype, count=rows * cols, offset=offset)
            self._hidden = shape, flat.view(rows, cols)
        return self._hidden[1]

    def _drop_last(self) -> None:
        """Move what was read beyond the last frame to the front, where frames begin."""
        if self._filled > self._used:
            rest = self._filled - self._used
            self._inbox[:rest] = self._inbox[self._used : self._filled]
        self._filled -= self._used
        self._used = 0

    def _fill(self, n_bytes: int) -> None:
        """Read until the inbox holds so many bytes, and whatever else has come."""
        if n_bytes > len(self._inbox):
            larger = _aligned(n_bytes)
            larger[: self._filled] = self._inbox[: self._filled]
            self._inbox, self._hidden = larger, None
        while self._filled < n_bytes:
            try:
                count = self._sock.recv_into(self._inbox[self._filled :])
            except OSError as error:
                raise PeerLostError(f"receiving: {error}") from error
            if count == 0:
                raise PeerLostError("the neighbour closed the edge")
            self._filled += count

    def close(self) -> None:
        """End the edge; the neighbour, and a receive that waits here, see end of file."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _payload_offset(meta_bytes: int) -> int:
    """Where the hidden states begin: as aligned as any other tensor."""
    return -(-(HEADER.size + meta_bytes) // _ALIGNMENT) * _ALIGNMENT


def _aligned(n_bytes: int) -> memoryview:
    # torch aligns its memory to cache lines, which GEMMs downstream like.
    return torch.empty(n_bytes, dtype=torch.uint8).numpy().data


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
                self._sock = socket.create_server((host, 0), family=_family(host))
            self.address = Address(host=host, port=self._sock.getsockname()[1])
        self._sock.listen(8)

    def accept(self, secret: bytes, epoch: int, timeout_s: float) -> Edge:
        """The neighbour's edge; strangers are turned away. `PeerLostError` after the timeout."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            with _lost_peer("waiting for a neighbour"):  # closed meanwhile, maybe
                self._sock.settimeout(left_s)
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


def _family(host: str) -> socket.AddressFamily:
    """Ray names hosts by their addresses, of either kind."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connect(address: Address, secret: bytes, epoch: int, timeout_s: float = 10.0) -> Edge:
    """Open an edge to a listener. Raises `PeerLostError`."""
    where = repr(address.path) if address.path else f"{address.host}:{address.port}"
    sock = socket.socket(
        socket.AF_UNIX if address.path is not None else _family(address.host or ""),
        socket.SOCK_STREAM,
    )
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


def _send_rest(sock: socket.socket, parts: Sequence[bytes | memoryview], sent: int) -> None:
    """What a first `sendmsg` left of the parts."""
    views = [memoryview(part) for part in parts]
    while views:
        while views and sent >= views[0].nbytes:
            sent -= views.pop(0).nbytes
        if views:
            views[0] = views[0][sent:]
            sent = sock.sendmsg(views)


@contextlib.contextmanager
def _lost_peer(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PeerLostError(f"{doing}: {error}") from error
