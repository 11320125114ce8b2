"""`make demo`: serve the demo model over two stages, stream one answer over HTTP, stop.

A client like any other: it starts `longspan serve` as a process of its own and talks to it over
HTTP only.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import typer

from serving.access import KEY_VARIABLE
from serving.fetch import fetch

QUESTION = "In three sentences, why does the sky look blue during the day and red at sunset?"
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_HOST = "127.0.0.1"


def main() -> None:
    """Run the demo; the exit status is the server's if it failed."""
    begin = time.monotonic()
    path = fetch("smollm2", report=lambda line: typer.echo(line, err=True))
    port = _free_port()
    command = [sys.executable, "-m", "serving.cli", "serve", str(path), "--stages", "2"]
    command += ["--port", str(port), "--context", "4096", "--model-name", "smollm2"]
    # Open, whatever keys its user has for other servers.
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    server = subprocess.Popen(command, env=environment)
    try:
        _wait_ready(server, port)
        typer.echo(f"\n> {QUESTION}\n")
        _answer(port)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(_STOP_TIMEOUT_S)
    typer.echo(f"done after {time.monotonic() - begin:.0f} s; nothing is left running")


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(server.returncode or 1)
        try:
            connection = http.client.HTTPConnection(_HOST, port, timeout=5)
            connection.request("GET", "/health/ready")
            ready = connection.getresponse().status == http.client.OK
            connection.close()
        except OSError:
            ready = False
        if ready:
            return
        time.sleep(0.2)
    typer.echo("the server did not become ready", err=True)
    sys.exit(1)


def _answer(port: int) -> None:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 160,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    first = begin
    usage: dict[str, int] = {}
    for chunk in _events(port, body):
        if chunk.get("usage"):
            usage = chunk["usage"]
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                first = time.perf_counter() if first == begin else first
                typer.echo(text, nl=False)
    spent = time.perf_counter() - first
    rate = (usage["completion_tokens"] - 1) / spent
    typer.echo(
        f"\n\n{usage['prompt_tokens']} prompt tokens, time to first token {first - begin:.2f} s, "
        f"{usage['completion_tokens']} tokens at {rate:.1f} tokens/s"
    )


def _events(port: int, body: dict[str, object]) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection(_HOST, port, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != http.client.OK:
        typer.echo(response.read().decode(), err=True)
        sys.exit(1)
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            break
        if data and not data.startswith(":"):
            yield json.loads(data)
    connection.close()


if __name__ == "__main__":
    main()
