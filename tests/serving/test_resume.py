"""Requests that outlive the replica that ran them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import closing

import pytest

from actors.request import Event, GenerateRequest
from serving.resume import MOST_RESUMES, ReplicaGoneError, resumed
from sharding.batch import Choice, SamplingParams
from sharding.errors import BusyError, LongspanError, RepeatedLossError
from sharding.gguf.reader import GGUFFile
from tests.stages import local_engine
from tests.tiny_gguf import tiny_model


class Replicas:
    """Of which each tells so many events of a request and is gone; the last lives."""

    def __init__(self, request: GenerateRequest, lives: list[int]) -> None:
        self.request = request
        self.asked: list[GenerateRequest] = []
        self.waited = 0
        self._lives = lives
        self._engine = local_engine(GGUFFile.from_bytes(tiny_model()), chunk=16)

    async def attempt(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """What one of them tells."""
        self.asked.append(request)
        left = self._lives.pop(0) if self._lives else 1000
        for event in self._engine.generate(request):
            if not left:
                raise ReplicaGoneError("it died")
            left -= 1
            yield event

    async def ready(self) -> None:
        """The next one serves."""
        self.waited += 1

    def run(self) -> list[Event]:
        """The whole request. Raises what ended it."""

        async def collect() -> list[Event]:
            return [event async for event in resumed(self.request, self.attempt, self.ready)]

        with closing(self._engine):
            return asyncio.run(collect())


def told(events: list[Event]) -> tuple[list[Choice], list[Choice], str | None]:
    """What a client learns: tokens, scores of its prompt, and how it ended."""
    return (
        [choice for event in events for choice in event.tokens],
        [choice for event in events for choice in event.prompt_scores],
        events[-1].finish_reason,
    )


REQUESTS = [
    GenerateRequest("greedy", list(range(3, 60)), 20, SamplingParams(temperature=0.0, logprobs=1)),
    GenerateRequest(
        "penalties",
        list(range(3, 40)),
        20,
        SamplingParams(seed=5, repetition_penalty=1.4, presence_penalty=0.5, min_tokens=18),
    ),
    GenerateRequest("scored", list(range(3, 90)), 6, SamplingParams(seed=5), prompt_logprobs=1),
    GenerateRequest("only scored", list(range(3, 90)), 0, prompt_logprobs=1),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.request_id)
@pytest.mark.parametrize("lives", [[1], [3], [4, 3]])
def test_a_client_hears_what_one_replica_would_have_said(
    request_: GenerateRequest, lives: list[int]
) -> None:
    """Every token and score once, whenever the replicas die: before the first chunk, within the
    prompt, within the answer."""
    whole = Replicas(request_, []).run()
    replicas = Replicas(request_, list(lives))
    events = replicas.run()
    assert told(events) == told(whole)
    assert replicas.waited == len(lives)
    assert len({request.request_id for request in replicas.asked}) == len(lives) + 1
    done = [event.prompt_done for event in events]
    assert done == sorted(done)
    assert {event.cached_tokens for event in events} == {0}


def test_what_kills_every_replica_ends_with_an_error_that_invites_to_nothing() -> None:
    replicas = Replicas(REQUESTS[0], [2] * (MOST_RESUMES + 1))
    with pytest.raises(RepeatedLossError, match="it died; 3 times"):
        replicas.run()
    assert len(replicas.asked) == MOST_RESUMES + 1


def test_a_replica_that_is_not_quite_there_costs_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its feed may be the old one's, its pipeline may break before it takes the request."""
    monkeypatch.setattr("serving.resume._AGAIN_S", 0.0)
    whole = Replicas(REQUESTS[1], []).run()
    replicas = Replicas(REQUESTS[1], [3, 0, 0, 0, 3])
    assert told(replicas.run()) == told(whole)
    assert [request.accepted for request in replicas.asked] == [False, *[True] * 5]


def test_what_was_not_accepted_is_not_tried_again() -> None:
    """Its client is told at once, and can ask elsewhere."""
    replicas = Replicas(REQUESTS[0], [0])
    with pytest.raises(ReplicaGoneError):
        replicas.run()
    assert replicas.waited == 0


def test_what_an_engine_says_itself_is_final() -> None:
    async def refuse(request: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield Event()
        raise BusyError("too many wait")

    async def ready() -> None:
        raise AssertionError("nothing is gone")

    async def collect() -> None:
        async for _ in resumed(REQUESTS[0], refuse, ready):
            pass

    with pytest.raises(LongspanError, match="too many wait"):
        asyncio.run(collect())
