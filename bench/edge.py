"""One stage edge between two processes: one-way time of a frame, by its payload.

    python -m bench.edge [--keep]

One process echoes what the other sends; half a round trip is one way. Median and 99th percentile
over `ROUNDS`.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import Annotated

import torch
import typer

from actors.transport import Address, Listener, connect
from bench.report import Report
from sharding.errors import PeerLostError

ROUNDS = 2000
_WARM_UP = 200
_SECRET = b"bench"
_CHUNK_BYTES = 512 * 576 * 4


def _echo(address: Address) -> None:
    torch.set_num_threads(1)
    edge = connect(address, _SECRET, 0)
    try:
        while True:
            frame = edge.receive()
            edge.send(frame.kind, frame.step, frame.meta, frame.hidden)
    except PeerLostError:
        edge.close()


def _one_way_s(host: str | None, payload_bytes: int, rounds: int) -> list[float]:
    hidden = torch.zeros(1, payload_bytes // 4)
    listener = Listener(host)
    # Not forked: a child must not share torch's threads.
    peer = multiprocessing.get_context("spawn").Process(target=_echo, args=(listener.address,))
    peer.start()
    edge = listener.accept(_SECRET, 0, timeout_s=60)
    times = []
    for step in range(_WARM_UP + rounds):
        begin = time.perf_counter()
        edge.send(2, step, b"", hidden)
        edge.receive()
        times.append((time.perf_counter() - begin) / 2)
    edge.close()
    listener.close()
    peer.join()
    return times[_WARM_UP:]


def main(keep: Annotated[bool, typer.Option(help="Write results/edge.json.")] = False) -> None:
    """Measure Unix and loopback TCP edges."""
    report = Report("edge", keep)
    for link, host in (("unix", None), ("tcp", "127.0.0.1")):
        for payload_bytes in (8 << 10, _CHUNK_BYTES):
            times = _one_way_s(host, payload_bytes, ROUNDS if payload_bytes < 1 << 20 else 200)
            report.row(
                test="edge one way",
                link=link,
                payload_bytes=payload_bytes,
                median_ms=round(statistics.median(times) * 1e3, 4),
                p99_ms=round(statistics.quantiles(times, n=100)[98] * 1e3, 4),
            )


if __name__ == "__main__":
    typer.run(main)
