"""What a prompt costs whose beginning was read before: here, and in llama.cpp's server.

    python -m bench.prefix MODEL [--tokens 4096] [--no-peer] [--keep]

Seconds from a request to the first piece of its answer, over HTTP, prompts of so many random tokens
and a question of 24; answers have 16 tokens, always the same one, so that both engines continue the
same conversation. `cached_tokens`: of the prompt, as this engine tells.

    first question    about a text that was never read
    next turn         the same, its answer and another question
    second question   about the same text
    back to a text    another text was read and asked about in between
    four at once      the same question four times about a text that was never read; until the last
                      of them begins to answer

This engine runs as `longspan serve` over two Ray stages, llama.cpp with four slots over one KV, as
its server does by default; both with as much KV as all texts need. `ratio` is the peer's seconds
over ours.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from bench.http_rates import Served, running
from bench.llama_server import llama_server
from bench.report import Report
from serving.fetch import resolve_model
from sharding.kernels.cpu import INSTRUCTION_SETS

_TOKEN_IDS = range(100, 20000)
_SAID, _ANSWER, _QUESTION = 1234, 16, 24
_AT_ONCE = 4


@dataclass(frozen=True)
class Server:
    """Where completions are asked for. `peer`: whether it is llama.cpp."""

    address: str
    peer: bool = False

    def ask(self, prompt: list[int]) -> tuple[float, int]:
        """Seconds to the first piece of the answer, and cached tokens; reads it to its end."""
        body: dict[str, Any] = {"prompt": prompt, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.peer:
            body |= {"n_predict": _ANSWER, "logit_bias": [[_SAID, 1000.0]], "cache_prompt": True}
        else:
            body |= {"max_tokens": _ANSWER, "logit_bias": {str(_SAID): 100}}
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=3600)
        path = "/completion" if self.peer else "/v1/completions"
        begin = time.perf_counter()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        first_s, cached = 0.0, 0
        for line in connection.getresponse():
            data = line.decode().strip().removeprefix("data: ")
            if not data or data[0] != "{":
                continue
            event = json.loads(data)
            said = event.get("content") or any(each["text"] for each in event.get("choices", []))
            if said and not first_s:
                first_s = time.perf_counter() - begin
            usage = event.get("usage")
            cached = usage["prompt_tokens_details"]["cached_tokens"] if usage else cached
        connection.close()
        if not first_s:
            raise RuntimeError(f"{self.address} gave no answer")
        return first_s, cached


def _measure(server: Server, tokens: int) -> Iterator[tuple[str, float, int]]:
    """Rows of one server: test, seconds, cached tokens."""
    chance = random.Random(0)

    def words(count: int) -> list[int]:
        return chance.choices(_TOKEN_IDS, k=count)

    server.ask(words(32))  # warms up
    text, other, third = words(tokens), words(tokens), words(tokens)
    turn = [*text, *words(_QUESTION)]
    yield "first question", *server.ask(turn)
    yield "next turn", *server.ask([*turn, *[_SAID] * _ANSWER, *words(_QUESTION)])
    yield "second question", *server.ask([*text, *words(_QUESTION)])
    server.ask([*other, *words(_QUESTION)])
    yield "back to a text", *server.ask([*text, *words(_QUESTION)])
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(server.ask, [[*third, *words(_QUESTION)]] * _AT_ONCE))
    yield "four at once", max(first_s for first_s, _ in found), min(cached for _, cached in found)


def main(
    model: str,
    tokens: int = 4096,
    peer: Annotated[bool, typer.Option(help="Measure llama.cpp too (xllamacpp).")] = True,
    keep: Annotated[bool, typer.Option(help="Write results/prefix-*.json.")] = False,
) -> None:
    """Measure one model."""
    path = resolve_model(model)
    context = tokens + 256
    report = Report("prefix", keep, INSTRUCTION_SETS[0])
    with running(Served(path, 2, context)) as port:
        ours = list(_measure(Server(f"http://127.0.0.1:{port}"), tokens))
    theirs: dict[str, float] = {}
    if peer:
        with llama_server(path, context, _AT_ONCE) as address:
            found = _measure(Server(address, peer=True), tokens)
            theirs = {test: first_s for test, first_s, _ in found}
    for test, first_s, cached in ours:
        figures: dict[str, str | float] = {"test": test, "model": path.name, "tokens": tokens}
        figures |= {"first_s": round(first_s, 3), "cached_tokens": cached}
        if test in theirs:
            figures["peer_first_s"] = round(theirs[test], 3)
            figures["ratio"] = round(theirs[test] / first_s, 2)
        report.row(**figures)


if __name__ == "__main__":
    typer.run(main)
