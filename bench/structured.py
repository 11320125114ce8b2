"""What answers of a given form cost: here, and in llama.cpp's server.

    python -m bench.structured MODEL [--rounds 5] [--no-peer] [--keep]

Seconds of a chat's whole answer over HTTP, greedy, the median of `rounds` after one that warms up
(so its prompt is cached on both sides). What is said differs little: the fields have few values.

    free text         64 tokens without a form, for comparison: what a token costs
    JSON of a schema  an object of eight fields, `response_format`
    call of a tool    one call with three arguments, `tool_choice` required
    four at once      the JSON four times, until the last is complete

This engine runs as `longspan serve` over two Ray stages, llama.cpp with four slots; `tokens` are
those of the answer as each server counts them. `ratio` is the peer's seconds over ours; none where
it does not call the tool, as llama.cpp's does not for models whose template knows none.
"""

from __future__ import annotations

import json
import statistics
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from bench.http_rates import Served, running
from bench.llama_server import llama_server
from bench.report import Report
from serving.fetch import resolve_model
from sharding.kernels.cpu import INSTRUCTION_SETS

_AT_ONCE, _CONTEXT, _FREE_TOKENS, _MOST_TOKENS = 4, 2048, 64, 400
_TIMEOUT_S = 600.0

_FIELDS = {
    "species": ["cat", "dog", "horse"],
    "colour": ["black", "white", "brown"],
    "size_class": ["small", "medium", "large"],
    "temperament": ["calm", "lively"],
    "living_environment": ["house", "garden", "stable"],
    "preferred_food": ["meat", "grass", "everything"],
    "is_domesticated": ["yes", "no"],
    "activity_period": ["day", "night"],
}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"enum": values} for name, values in _FIELDS.items()},
    "required": list(_FIELDS),
    "additionalProperties": False,
}
_ARGUMENTS = ("species", "colour", "size_class")
_TOOL = {
    "type": "function",
    "function": {
        "name": "register_animal",
        "description": "Enters an animal into the register.",
        "parameters": {
            "type": "object",
            "properties": {name: {"enum": _FIELDS[name]} for name in _ARGUMENTS},
            "required": list(_ARGUMENTS),
            "additionalProperties": False,
        },
    },
}
_TESTS: dict[str, dict[str, Any]] = {
    "free text": {"max_tokens": _FREE_TOKENS, "ignore_eos": True},
    "JSON of a schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "animal", "schema": _SCHEMA},
        }
    },
    "call of a tool": {
        "tools": [_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
}
_QUESTION = "Describe a small black cat that lives in a house, and enter it into the register."


class NoCallError(RuntimeError):
    """An answer that must call a tool does not."""


def _ask(address: str, fields: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
    """Seconds, tokens of the answer, and the message."""
    body = {"messages": [{"role": "user", "content": _QUESTION}], "temperature": 0}
    body |= {"max_tokens": _MOST_TOKENS} | fields
    request = urllib.request.Request(
        address + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        answer = json.load(response)
    spent_s = time.perf_counter() - begin
    message: dict[str, Any] = answer["choices"][0]["message"]
    return spent_s, answer["usage"]["completion_tokens"], message


def _check(test: str, message: dict[str, Any]) -> None:
    """Raises `RuntimeError` for an answer that is not what was asked for."""
    if test == "free text":
        return
    called = test == "call of a tool"
    if called and not message.get("tool_calls"):
        raise NoCallError(f"{test}: {message['content']:.80}")
    text = message["tool_calls"][0]["function"]["arguments"] if called else message["content"]
    names = _ARGUMENTS if called else _FIELDS
    found = json.loads(text)
    if set(found) != set(names) or any(found[name] not in _FIELDS[name] for name in names):
        raise RuntimeError(f"{test}: {text}")


def _measure(address: str, rounds: int) -> Iterator[tuple[str, float, int]]:
    for test, fields in _TESTS.items():
        found = [_ask(address, fields)]
        try:
            _check(test, found[0][2])
        except NoCallError as error:
            typer.echo(f"{address}: {error}", err=True)
            continue
        found = [_ask(address, fields) for _ in range(rounds)]
        for _, _, message in found:
            _check(test, message)
        yield test, statistics.median(spent_s for spent_s, _, _ in found), found[0][1]
    fields = _TESTS["JSON of a schema"]
    spent = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in range(rounds):
            begin = time.perf_counter()
            answers = list(pool.map(lambda _: _ask(address, fields), range(_AT_ONCE)))
            spent.append(time.perf_counter() - begin)
    yield "four at once", statistics.median(spent), sum(tokens for _, tokens, _ in answers)


def main(
    model: str,
    rounds: int = 5,
    peer: Annotated[bool, typer.Option(help="Measure llama.cpp too (xllamacpp).")] = True,
    keep: Annotated[bool, typer.Option(help="Write results/structured-*.json.")] = False,
) -> None:
    """Measure one model."""
    path = resolve_model(model)
    report = Report("structured", keep, INSTRUCTION_SETS[0])
    with running(Served(path, 2, _CONTEXT)) as port:
        ours = list(_measure(f"http://127.0.0.1:{port}", rounds))
    theirs: dict[str, tuple[float, int]] = {}
    if peer:
        with llama_server(path, _CONTEXT, _AT_ONCE) as address:
            theirs = {test: (spent_s, n) for test, spent_s, n in _measure(address, rounds)}
    for test, spent_s, tokens in ours:
        figures: dict[str, str | float] = {"test": test, "model": path.name}
        figures |= {"answer_s": round(spent_s, 3), "tokens": tokens}
        if test in theirs:
            peer_s, peer_tokens = theirs[test]
            figures |= {"peer_answer_s": round(peer_s, 3), "peer_tokens": peer_tokens}
            figures["ratio"] = round(peer_s / spent_s, 2)
        report.row(**figures)


if __name__ == "__main__":
    typer.run(main)
