"""Prompt and decode rates of `longspan serve` as an HTTP client sees them.

The server is a process of its own, over Ray stages of this machine, started for one measurement
and ended after it. Prompts are random token ids through `POST /v1/completions`, streamed, one at a
time:

    pp    prompt tokens over the time from sending the request to the first piece of text
    tg    tokens after the first over the time from the first piece to the last

Both include HTTP, JSON, Ray and the edges between stages. A first token that is half a character
would be seen one token late.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOST = "127.0.0.1"
_START_TIMEOUT_S, _STOP_TIMEOUT_S, _ANSWER_TIMEOUT_S = 600.0, 60.0, 3600.0
_TOKEN_IDS = range(100, 20000)  # as the peer's script draws them


@dataclass(frozen=True)
class Served:
    """What to serve; `threads` of each stage, None for the server's own choice."""

    path: Path
    stages: int
    context: int
    threads: int | None = None


@dataclass(frozen=True)
class Streamed:
    """One answer: seconds from the request to the first and the last piece, and its usage."""

    first_s: float
    last_s: float
    prompt_tokens: int
    tokens: int

    @property
    def pp_tok_s(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.first_s

    @property
    def tg_tok_s(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.last_s - self.first_s)


def stream_all(
    served: Served, lengths: Sequence[int], tokens: int, seed: int
) -> list[tuple[int, Streamed]]:
    """Start a server, send a random prompt of each length, draw `tokens` after each, stop it.

    Raises `RuntimeError` if it does not start, refuses a prompt or answers with fewer tokens.
    """
    chance = random.Random(seed)
    with running(served) as port:
        _stream(port, chance.choices(_TOKEN_IDS, k=32), tokens)  # warms up
        return [
            (length, _stream(port, chance.choices(_TOKEN_IDS, k=length), tokens))
            for length in lengths
        ]


@contextlib.contextmanager
def running(served: Served) -> Iterator[int]:
    """A server's port while it runs; what it says goes to stderr."""
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serving.cli", "serve", str(served.path)]
    command += ["--port", str(port), "--stages", str(served.stages)]
    command += ["--context", str(served.context)]
    if served.threads is not None:
        command += ["--threads", str(served.threads)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_ready(server, port)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(_STOP_TIMEOUT_S)


def _wait_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection(_HOST, port, timeout=5)
            connection.request("GET", "/health/ready")
            status = connection.getresponse().status
            connection.close()
            if status == http.client.OK:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {_START_TIMEOUT_S:.0f} s")


def _stream(port: int, prompt: list[int], tokens: int) -> Streamed:
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    for chunk in _events(port, body):
        now = time.perf_counter() - begin
        usage = chunk.get("usage") or usage
        times += [now for choice in chunk["choices"] if choice["text"] or choice["finish_reason"]]
    streamed = Streamed(times[0], times[-1], usage["prompt_tokens"], usage["completion_tokens"])
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    if (streamed.prompt_tokens, streamed.tokens, cached) != (len(prompt), tokens, 0):
        raise RuntimeError(f"{len(prompt)} + {tokens} uncached tokens were asked for: {usage}")
    return streamed


def _events(port: int, body: dict[str, object]) -> Iterator[dict[str, Any]]:
    """A streamed completion's chunks. Raises `RuntimeError` for any other answer."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_TIMEOUT_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise RuntimeError(f"status {response.status}: {response.read().decode()}")
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            break
        if data and not data.startswith(":"):
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(data)
            yield event
    connection.close()
