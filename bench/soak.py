"""Rough use for minutes: clients that stream, leave, ask nonsense and send long prompts, while
stages die.

    python -m bench.soak MODEL [--minutes 5] [--clients 8] [--kills 4] [--seed 0] [--keep]

Through HTTP, Ray Serve and two Ray stages on one machine. Every question is first asked alone, and
whenever a client has its answer under load it must be the same, token for token. A stage is killed
or stopped (in turn) at even distances. Figures of the row:

    answers             complete ones, all of them compared; `tokens_s` are their drawn tokens
    left, refused       clients that left, nonsense that was answered with 4xx
    unavailable, lost   503 and 429, and streams that ended with an error event: what a dying stage
                        costs its users
    repair_s            from the signal until the engine is ready again, median and most
    engine_mib, ...     by how much a process grew in private memory after the first third
    wrong               answers that differ, streams that end in neither a `[DONE]` nor an error,
                        statuses that no client deserved, pages that nobody gave back

Exits with 1 if anything is wrong, and says what.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.report import Report
from serving.cluster import Deployment, deployed
from serving.config import ServeConfig
from serving.fetch import resolve_model
from sharding.errors import UnavailableError

_HOST = "127.0.0.1"
_CONTEXT = 2048
_LENGTHS = (1, 5, 17, 60, 150, 400, 1500)
_TOKEN_IDS = range(100, 20000)
_TIMEOUT_S = 300.0
_QUIET_S = 60.0
_UNDESERVED = (503, 429)
_STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}

_NONSENSE: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b'{"prompt": "x", "model": "no such model"}',
    b'{"prompt": [1, -2]}',
    b'{"prompt": [], "max_tokens": 4}',
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "temperature": "hot"}',
    json.dumps({"prompt": [100] * (_CONTEXT + 1)}).encode(),
)


class BrokenStreamError(Exception):
    """An answer that ended in neither of the ways in which one may."""


class LostError(Exception):
    """An answer that ended with an error event."""


class RefusedError(Exception):
    """A status that is not 200."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said:.200}")
        self.status = status


@dataclass(frozen=True)
class Question:
    """A request's body, and its answer alone."""

    body: dict[str, Any]
    answer: tuple[str, int]


@dataclass
class Tally:
    """What happened; of many threads."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, by: int = 1) -> None:
        """One more of these."""
        with self.lock:
            self.counts[name] += by

    def complain(self, about: str) -> None:
        """Something is wrong."""
        with self.lock:
            self.wrong.append(about)


def _post(port: int, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(_HOST, port, timeout=_TIMEOUT_S)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        with response:
            said = response.read().decode()
        connection.close()
        raise RefusedError(response.status, said)
    return connection, response


def _ask(port: int, body: dict[str, Any], stream: bool) -> tuple[str, int]:
    """The text and how many tokens it has."""
    connection, response = _post(port, json.dumps(body | _STREAMED if stream else body).encode())
    with response:
        if not stream:
            answer = json.loads(response.read())
            text, tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
        else:
            text, tokens = "", 0
            for chunk in _events(response):
                text += "".join(choice["text"] for choice in chunk["choices"])
                tokens = (chunk.get("usage") or {"completion_tokens": 0})["completion_tokens"]
    connection.close()
    return text, tokens


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if data and not data.startswith(":"):
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise LostError(data)
            yield event
    raise BrokenStreamError("a stream ended without [DONE] or an error")


class Client(threading.Thread):
    """Does one thing after the other until it is time."""

    def __init__(
        self, port: int, questions: list[Question], tally: Tally, until: float, seed: int
    ) -> None:
        super().__init__(daemon=True)
        self._port, self._questions, self._tally, self._until = port, questions, tally, until
        self._chance = random.Random(seed)

    def run(self) -> None:
        """Whatever happens is counted; what may not happen is told."""
        while time.monotonic() < self._until:
            question = self._chance.choice(self._questions)
            act = self._chance.choices((self._listen, self._leave, self._err), (6, 2, 1))[0]
            try:
                act(question)
            except LostError:
                self._tally.count("lost")
            except RefusedError as error:
                if error.status in _UNDESERVED:
                    self._tally.count("unavailable")
                    time.sleep(0.2)
                else:
                    self._tally.complain(str(error))
            except (BrokenStreamError, OSError, http.client.HTTPException) as error:
                self._tally.complain(f"{type(error).__name__}: {error}")

    def _listen(self, question: Question) -> None:
        found = _ask(self._port, question.body, stream=self._chance.random() < 0.7)
        self._tally.count("answers")
        self._tally.count("tokens", found[1])
        if found != question.answer:
            about = {key: value for key, value in question.body.items() if key != "prompt"}
            length = len(question.body["prompt"])
            self._tally.complain(f"{length} tokens, {about}: {found} instead of {question.answer}")

    def _leave(self, question: Question) -> None:
        body = question.body | _STREAMED | {"max_tokens": 400}
        connection, response = _post(self._port, json.dumps(body).encode())
        for _ in range(self._chance.randrange(6)):
            response.readline()
        response.close()
        connection.close()
        self._tally.count("left")

    def _err(self, question: Question) -> None:
        body = self._chance.choice(_NONSENSE)
        try:
            _post(self._port, body)
        except RefusedError as error:
            if error.status in _UNDESERVED or error.status >= http.client.INTERNAL_SERVER_ERROR:
                raise
            self._tally.count("refused")
        else:
            self._tally.complain(f"{body[:80]!r} was answered")


def _questions(port: int, chance: random.Random) -> list[Question]:
    """Greedy and drawn ones of every length, some of which must keep to a form, asked alone."""
    asked: list[Question] = []
    for length in _LENGTHS:
        for temperature in (0.0, 0.9):
            body: dict[str, Any] = {
                "prompt": chance.choices(_TOKEN_IDS, k=length),
                "max_tokens": chance.randrange(1, 60),
                "temperature": temperature,
                "top_p": 0.95,
                "seed": chance.randrange(1000),
                "ignore_eos": True,
            }
            if len(asked) % 3 == 1:
                body["guided_regex"] = '([a-z]{2,9} )+|"fields": [{]("name": "[a-z]+", )+[}]'
            asked.append(Question(body, _ask(port, body, stream=True)))
    return asked


def _wait_ready(deployment: Deployment, epoch: int) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if deployment.status().state == "ready" and deployment.stats().epoch >= epoch:
                return
        except UnavailableError:
            pass
        time.sleep(0.05)
    raise UnavailableError(f"the engine was not ready after {_TIMEOUT_S:.0f} s")


def _end_a_stage(deployment: Deployment, number: int) -> float:
    """Kill or stop one; seconds until all is well again."""
    epoch, (_, stages) = deployment.stats().epoch, deployment.pids()
    begin = time.monotonic()
    signals = (signal.SIGKILL, signal.SIGSTOP)
    os.kill(stages[number % len(stages)], signals[number // len(stages) % len(signals)])
    _wait_ready(deployment, epoch + 1)
    return time.monotonic() - begin


def _private_bytes() -> dict[tuple[int, str], int]:
    """Of each process of Serve below this one, by its number and what it is."""
    parents, names, sizes = {}, {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(
                line.split(":\t", 1)
                for line in (folder / "status").read_text().splitlines()
                if ":\t" in line
            )
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended
            continue
        pid = int(folder.name)
        parents[pid] = int(status["PPid"])
        sizes[pid] = int(status.get("RssAnon", "0 kB").split()[0]) << 10
        for sign, name in ((":ingress", "ingress"), (":engine", "engine"), ("::Proxy", "proxy")):
            if sign in title:
                names[pid] = name
    return {(pid, name): sizes[pid] for pid, name in names.items() if _below(pid, parents)}


def _below(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _held_pages(deployment: Deployment) -> int:
    """Pages that the engine or a stage still counts as used, once all is quiet."""
    deadline, held = time.monotonic() + _QUIET_S, -1
    while held and time.monotonic() < deadline:
        stats = deployment.stats()
        held = stats.pages - stats.pages_free + sum(stage.pages_used for stage in stats.stages)
        held += stats.running + stats.waiting
        time.sleep(0.2)
    return held


def _soak(
    deployment: Deployment, port: int, seconds: float, clients: int, kills: int, seed: int
) -> tuple[dict[str, float], list[str]]:
    """The row's figures, and what was wrong."""
    questions, tally, repairs = _questions(port, random.Random(seed)), Tally(), []
    begin = time.monotonic()
    crowd = [
        Client(port, questions, tally, begin + seconds, seed + number) for number in range(clients)
    ]
    for client in crowd:
        client.start()
    time.sleep(seconds / 3)
    before = _private_bytes()
    for number in range(kills):
        due = begin + seconds * (1 / 3 + 2 / 3 * (number + 0.5) / kills)
        time.sleep(max(0.0, due - time.monotonic()))
        repairs.append(_end_a_stage(deployment, number))
    for client in crowd:
        client.join()
    took = time.monotonic() - begin
    if held := _held_pages(deployment):
        tally.complain(f"{held} pages and requests are still held")
    after = _private_bytes()
    grown: Counter[str] = Counter()
    for process in before.keys() & after.keys():
        grown[f"{process[1]}_mib"] += (after[process] - before[process]) >> 20
    names = ("answers", "left", "refused", "unavailable", "lost")
    figures: dict[str, float] = {name: tally.counts[name] for name in names}
    figures["tokens_s"] = round(tally.counts["tokens"] / took, 1)
    if repairs:
        figures["repair_s"] = round(statistics.median(repairs), 2)
        figures["repair_s_most"] = round(max(repairs), 2)
    return figures | grown | {"wrong": len(tally.wrong)}, tally.wrong


def main(
    model: str,
    minutes: Annotated[float, typer.Option(min=0.1)] = 5.0,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    kills: Annotated[int, typer.Option(min=0)] = 4,
    seed: int = 0,
    keep: Annotated[bool, typer.Option(help="Write results/soak.json.")] = False,
) -> None:
    """Serve one model and use it roughly."""
    path = resolve_model(model)
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    report = Report("soak", keep)
    config = ServeConfig(
        model=str(path), context=_CONTEXT, kv_tokens=4 * _CONTEXT, port=port, max_waiting=16
    )
    with deployed(config) as deployment:
        _wait_ready(deployment, 0)
        figures, wrong = _soak(deployment, port, minutes * 60, clients, kills, seed)
    report.row(
        test="soak",
        model=path.name,
        stages=config.stages,
        minutes=minutes,
        clients=clients,
        kills=kills,
        seed=seed,
        **figures,
    )
    for complaint in wrong[:20]:
        typer.echo(complaint, err=True)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
