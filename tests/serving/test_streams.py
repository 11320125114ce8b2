"""Streams: what is sent when, what happens when either side goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import openai
import pytest

from actors.request import LENGTH, Event, GenerateRequest
from sharding.errors import PeerLostError
from tests.serving.fakes import (
    ACCEPTED,
    Exchange,
    Script,
    Step,
    World,
    chat_body,
    choices,
    frames,
    saying,
    scored,
)


def contents(sent: list[Any], index: int = 0) -> str:
    """The text that chat chunks add to a choice."""
    all_choices = [choice for chunk in sent for choice in chunk["choices"]]
    return "".join(c["delta"].get("content", "") for c in all_choices if c["index"] == index)


def test_a_chat_stream_has_openais_shape() -> None:
    response = World(saying("Hi")).chat(stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = frames(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "i"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_all_chunks_have_one_id_and_one_time() -> None:
    *chunks, _ = frames(World(saying("Hello")).chat(stream=True))
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def reading(request: GenerateRequest) -> Iterable[Step]:
    """A script that reads a prompt of which something was there, in three chunks."""
    yield ACCEPTED
    for done in (48, 80, 100):
        tokens = choices("a") if done == 100 else []
        yield Event(tokens=tokens, prompt_done=done, cached_tokens=16)
    yield Event(tokens=choices("b"), prompt_done=100, cached_tokens=16, finish_reason=LENGTH)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_long_prompt_tells_how_far_it_was_read(path: str) -> None:
    """As llama.cpp does; a client that knows nothing of it sees chunks that add nothing."""
    world = World(reading)
    asked = chat_body("x" * 95) if "chat" in path else {"prompt": "x" * 99}
    body = {**asked, "stream": True, "return_progress": True}
    chunks = frames(world.post(path, body))[:-1]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    total = len(world.engine.requests[0].prompt)
    assert [(each["cache"], each["processed"]) for each in told] == [(16, 48), (16, 80), (16, 100)]
    assert {each["total"] for each in told} == {total}
    assert all(each["time_ms"] >= 0 for each in told)
    silent = frames(world.post(path, {**asked, "stream": True}))[:-1]
    assert not any("prompt_progress" in chunk for chunk in silent)

    def said(chunks: list[Any]) -> list[str]:
        parts = [chunk["choices"][0] for chunk in chunks]
        return [
            part["delta"].get("content", "") if "chat" in path else part["text"] for part in parts
        ]

    assert [text for text in said(chunks) if text] == [text for text in said(silent) if text]


def test_usage_comes_last_and_only_if_asked_for() -> None:
    options = {"include_usage": True}
    *chunks, usage, _ = frames(World(saying("Hi")).chat(stream=True, stream_options=options))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks)
    *chunks, _ = frames(World(saying("Hi")).chat(stream=True))
    assert all(chunk["choices"] for chunk in chunks)


def test_characters_are_never_split_between_chunks() -> None:
    *chunks, _ = frames(World(saying("né😀")).chat(stream=True))
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "n", "é", "😀", None]


def test_stop_strings_never_leak() -> None:
    *chunks, _ = frames(World(saying("a ENd END b")).chat(stream=True, stop="END"))
    assert contents(chunks) == "a ENd "
    assert not any("EN" in c["choices"][0]["delta"].get("content", "")[-2:] for c in chunks)


def test_the_choices_of_a_stream_are_told_apart() -> None:
    def by_index(request: GenerateRequest) -> Iterable[Step]:
        return saying(request.request_id[-1] * 3)(request)

    *chunks, _ = frames(World(by_index).chat(stream=True, n=2))
    assert [contents(chunks, index) for index in range(2)] == ["000", "111"]


def test_a_completion_stream_has_openais_shape() -> None:
    *chunks, done = frames(World(saying("Hi")).complete(stream=True))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["H", "i", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_echo_comes_before_the_answer() -> None:
    *chunks, _ = frames(World(saying("!")).complete("hé", echo=True, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hé", "!", ""]


def test_a_scored_echo_comes_once_it_is_scored() -> None:
    *chunks, _ = frames(World(scored).complete("hi", echo=True, logprobs=1, stream=True))
    first, second, _ = (chunk["choices"][0] for chunk in chunks)
    assert (first["text"], first["logprobs"]["tokens"]) == ("hi", ["<s>", "h", "i"])
    assert (second["text"], second["logprobs"]["text_offset"]) == ("ab", [2, 3])


def test_the_logprobs_of_a_chat_stream_add_up_to_its_text() -> None:
    *chunks, _ = frames(World(scored).chat(stream=True, logprobs=True))
    entries = [
        entry["token"]
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(entries) == contents(chunks)


@pytest.mark.parametrize("broken", [Event(error="stage 1 is gone"), PeerLostError("is gone")])
def test_a_broken_stream_ends_in_an_error_without_done(broken: Step) -> None:
    """With [DONE], a cut answer would look whole."""
    response = World(lambda _: [ACCEPTED, Event(tokens=choices("a")), broken]).chat(stream=True)
    *_, text, error = frames(response)
    assert text["choices"][0]["delta"] == {"content": "a"}
    assert "is gone" in error["error"]["message"]
    assert error["error"]["code"] == "pipeline_error"


def test_a_broken_stream_says_nothing_of_the_inside() -> None:
    response = World(lambda _: [ACCEPTED, OSError("/secret")]).chat(stream=True)
    assert frames(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text


def test_the_openai_client_raises_when_a_stream_breaks() -> None:
    world = World(lambda _: [ACCEPTED, Event(tokens=choices("a")), Event(error="gone")])

    async def play(client: openai.AsyncOpenAI) -> None:
        chunks = await client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="gone"):
            [chunk async for chunk in chunks]

    asyncio.run(world.with_openai(play))


def live(
    script: Script, body: dict[str, object], play: Callable[[Exchange, World], Awaitable[None]]
) -> World:
    """Play a part with a chat that is under way; comments come after 20 ms of silence."""
    world = World(script, keep_alive_s=0.02)

    async def run() -> None:
        exchange = Exchange(world, "/v1/chat/completions", body)
        try:
            await play(exchange, world)
        finally:
            exchange.task.cancel()
            await asyncio.gather(exchange.task, return_exceptions=True)

    asyncio.run(run())
    return world


def test_comments_keep_a_silent_stream_open() -> None:
    """Clients give up on a prefill of minutes that sends nothing."""
    prefilled = asyncio.Event()

    async def play(exchange: Exchange, world: World) -> None:
        await exchange.until(lambda: exchange.sent.count(b":\n\n") >= 3)
        assert b'"role":"assistant"' in exchange.sent, "the stream began before the prefill ended"
        prefilled.set()
        await exchange.until(lambda: exchange.over)
        assert exchange.sent.endswith(b"data: [DONE]\n\n")

    def script(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        yield prefilled
        yield Event(tokens=choices("a"), finish_reason=LENGTH)

    live(script, chat_body(stream=True), play)


def test_progress_without_text_is_silence_too() -> None:
    """Engine events that send nothing must not put the comment off for ever."""

    def script(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        for done in range(1, 100_000):
            yield 0.005
            yield Event(prompt_done=done)

    async def play(exchange: Exchange, world: World) -> None:
        await exchange.until(lambda: exchange.sent.count(b":\n\n") >= 2)

    live(script, chat_body(stream=True), play)


def waiting(request: GenerateRequest) -> Iterable[Step]:
    """Accepted, then nothing for an hour."""
    yield ACCEPTED
    yield 3600.0


def never_accepted(request: GenerateRequest) -> Iterable[Step]:
    """Not even accepted."""
    yield 3600.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [waiting, never_accepted])
def test_a_client_that_leaves_cancels_all_its_choices(script: Script, stream: bool) -> None:
    """A client that gives up and asks again would otherwise run its long prompt twice, and more."""

    async def play(exchange: Exchange, world: World) -> None:
        await exchange.until(lambda: len(world.engine.requests) == 3)
        exchange.hang_up()
        await exchange.until(exchange.task.done)
        assert len(world.engine.cancelled) == 3
        await exchange.task

    live(script, chat_body(stream=stream, n=3), play)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_drops_the_request_cancels_its_choices(stream: bool) -> None:
    """Ray Serve cancels the task when its proxy lost the client."""

    async def play(exchange: Exchange, world: World) -> None:
        await exchange.until(lambda: len(world.engine.requests) == 2)
        exchange.task.cancel()
        await exchange.until(exchange.task.done)
        assert len(world.engine.cancelled) == 2

    live(waiting, chat_body(stream=stream, n=2), play)


def test_a_finished_answer_is_not_cancelled() -> None:
    world = World(saying("Hello"))
    world.chat(stream=True, n=2)
    assert (len(world.engine.ended), world.engine.cancelled) == (2, [])


def test_a_stop_string_cancels_only_its_own_choice() -> None:
    def script(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        if request.request_id.endswith("-0"):
            yield Event(tokens=choices("a!"))
            yield 3600.0
        yield 0.02
        yield from saying("bb")(request)

    world = World(script)
    *chunks, done = frames(world.chat(stream=True, n=2, stop="!"))
    assert (contents(chunks, 0), contents(chunks, 1), done) == ("a", "bb", "[DONE]")
    assert [request_id[-2:] for request_id in world.engine.cancelled] == ["-0"]
