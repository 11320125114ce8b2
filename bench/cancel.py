"""How soon a client that hangs up stops costing anything: from closing the socket to free pages.

    python -m bench.cancel MODEL [--rounds 20] [--keep]

A streamed completion is left after its third line; then the engine is asked until its books show
every page free. The time includes the asking. Through HTTP, Ray Serve and two Ray stages on one
machine.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import time
from typing import Annotated

import typer

from bench.report import Report
from serving.cluster import Deployment, deployed
from serving.config import ServeConfig
from serving.fetch import resolve_model

_HOST = "127.0.0.1"


def _pages_used(deployment: Deployment) -> int:
    stats = deployment.stats()
    return stats.pages - stats.pages_free


def _hang_up_s(deployment: Deployment, port: int, model: str) -> float:
    """Seconds from closing the connection until nothing is reserved."""
    body = {"model": model, "prompt": "Tell me", "max_tokens": 900, "stream": True}
    connection = http.client.HTTPConnection(_HOST, port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}), headers)
    response = connection.getresponse()
    for _ in range(3):
        response.readline()
    if _pages_used(deployment) == 0:
        raise typer.BadParameter("the answer ended before the client could leave")
    begin = time.perf_counter()
    response.close()
    connection.close()
    while _pages_used(deployment) > 0:
        pass
    return time.perf_counter() - begin


def main(
    model: str,
    rounds: int = 20,
    keep: Annotated[bool, typer.Option(help="Write results/cancel.json.")] = False,
) -> None:
    """Measure one model."""
    path = resolve_model(model)
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    report = Report("cancel", keep)
    config = ServeConfig(model=str(path), context=1024, port=port)
    with deployed(config) as deployment:
        while deployment.status().state != "ready":
            time.sleep(0.2)
        times = [_hang_up_s(deployment, port, config.served_name) for _ in range(rounds)]
    report.row(
        test="hang up to free pages",
        model=path.name,
        stages=config.stages,
        rounds=rounds,
        median_ms=round(statistics.median(times) * 1e3, 1),
        max_ms=round(max(times) * 1e3, 1),
    )


if __name__ == "__main__":
    typer.run(main)
