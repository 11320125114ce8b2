"""POST /v1/chat/completions as clients see it, whole answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import openai
import pytest

from actors.request import LENGTH, STOP, Event, GenerateRequest
from sharding.batch import Choice
from sharding.errors import PeerLostError
from tests.serving.fakes import (
    ACCEPTED,
    BOS,
    EOS,
    Step,
    World,
    choices,
    error_of,
    saying,
    scored,
)

ROLES = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def prompt_of(world: World) -> str:
    return world.service.tokenizer.decode(world.engine.requests[0].prompt, skip_special=False)


def test_an_answer_has_openais_shape() -> None:
    body = World(saying("Hello")).chat("hi").json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert (body["model"], body["system_fingerprint"]) == ("tiny", "fp_test")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


def test_usage_counts_the_prompt_once_and_every_drawn_token() -> None:
    world = World(saying("Hello"), template="{{ messages[0].content }}")
    usage = world.chat("abc", n=2).json()["usage"]
    assert usage == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_usage_tells_what_of_the_prompt_was_not_read_again() -> None:
    """Of several choices, what none of them read: the first one reads for all."""
    cached = iter([32, 48])

    def script(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        yield Event(cached_tokens=next(cached), tokens=choices("a"))
        yield Event(tokens=choices("b"), finish_reason=LENGTH)

    usage = World(script).chat("abc", n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}


def test_what_clients_say_of_the_prefix_cache_reaches_the_engine() -> None:
    world = World()
    for fields in ({}, {"cache_prompt": False}, {"cache_salt": "me", "cache_prompt": True}):
        assert world.chat(**fields).status_code == 200
    asked = [(request.cached, request.cache_salt) for request in world.engine.requests]
    assert asked == [(True, ""), (False, ""), (True, "me")]
    assert error_of(world.chat(cache_salt=""))["param"] == "cache_salt"


@pytest.mark.parametrize(("suspect", "status", "again"), [(False, 503, None), (True, 500, "false")])
def test_a_client_is_not_told_to_repeat_what_broke_the_engine(
    suspect: bool, status: int, again: str | None
) -> None:
    """The `openai` client repeats a 503 by itself."""
    answer = World(lambda request: [ACCEPTED, Event(error="it broke", suspect=suspect)]).chat()
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == again
    assert error_of(answer)["message"] == "it broke"


def test_the_length_limit_is_told() -> None:
    assert World(saying("He", LENGTH)).chat().json()["choices"][0]["finish_reason"] == "length"


def test_the_template_makes_the_prompt() -> None:
    world = World(template=ROLES + "{% if add_generation_prompt %}>{% endif %}")
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
    ]
    assert world.chat(messages=messages).status_code == 200
    assert prompt_of(world) == (
        "<s>system:be kind;user:a\nb;assistant:;user:<tool_response>\n42\n</tool_response>;>"
    )


def test_the_generation_prompt_can_be_left_out() -> None:
    world = World(template="x{% if add_generation_prompt %}>{% endif %}")
    world.chat(add_generation_prompt=False)
    assert prompt_of(world) == "<s>x"


def test_a_template_that_writes_the_first_token_itself_gets_no_second() -> None:
    """Two of them change the answers of many models, and nothing would tell."""
    world = World(template="{{ bos_token }}{{ messages[0].content }}")
    world.chat("hi")
    assert world.engine.requests[0].prompt == [BOS, *b"hi"]


def test_a_template_s_refusal_is_a_400_in_its_own_words() -> None:
    response = World(template="{{ raise_exception('roles must alternate') }}").chat()
    assert response.status_code == 400
    assert "roles must alternate" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{}]},
            "messages[0].tool_calls[0].function",
        ),
    ],
)
def test_a_message_at_fault_is_named(message: dict[str, object], param: str) -> None:
    response = World().chat(messages=[message])
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_images_are_refused_by_their_name() -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    response = World().chat(messages=[{"role": "user", "content": [part]}])
    assert "image_url" in error_of(response)["message"]


def test_a_chat_needs_messages_and_a_token_to_answer() -> None:
    assert error_of(World().chat(messages=[]))["param"] == "messages"
    assert error_of(World().chat(max_tokens=0))["param"] == "max_tokens"


def test_stop_strings_cut_the_answer_and_cancel_the_engine() -> None:
    """The engine would otherwise draw on to the length limit for nobody."""

    def endless(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        yield from [Event(tokens=[choice]) for choice in choices("one END two")]
        yield 60.0

    world = World(endless)
    choice = world.chat(stop=["END", "never"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")
    assert len(world.engine.cancelled) == 1


def test_choices_come_in_their_order_whatever_ends_first() -> None:
    def by_index(request: GenerateRequest) -> Iterable[Step]:
        index = int(request.request_id.rpartition("-")[2])
        yield ACCEPTED
        yield 0.03 * (3 - index)
        yield Event(tokens=choices(str(index)), finish_reason=LENGTH)

    answers = World(by_index).chat(n=3).json()["choices"]
    assert [a["index"] for a in answers] == [0, 1, 2]
    assert [a["message"]["content"] for a in answers] == ["0", "1", "2"]


def test_one_failing_choice_cancels_the_others() -> None:
    """Half an answer helps nobody, and the rest would go on for nobody."""

    def second_fails(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        if request.request_id.endswith("-1"):
            raise PeerLostError("stage 1 is gone")
        yield 60.0

    world = World(second_fails)
    assert world.chat(n=3).status_code == 503
    assert len(world.engine.ended) == 3


@pytest.mark.parametrize(
    "last",
    [
        Event(error="stage 1 is gone"),
        Event(),
        asyncio.CancelledError(),
    ],
)
def test_an_answer_that_the_engine_did_not_finish_is_an_error(last: Step) -> None:
    """A cut answer must never look whole."""
    assert World(lambda _: [ACCEPTED, Event(tokens=choices("a")), last]).chat().status_code == 503


def test_logprobs_have_openais_shape() -> None:
    body = World(scored).chat(logprobs=True, top_logprobs=2, max_tokens=1).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -9.7,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "x", "logprob": -0.5, "bytes": [120]},
                    {"token": "a", "logprob": -9.7, "bytes": [97]},
                ],
            }
        ],
        "refusal": None,
    }


def test_logprobs_without_alternatives() -> None:
    world = World(scored)
    content = world.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[], []]
    assert world.engine.requests[0].sampling.logprobs == 0


def test_alternatives_need_logprobs() -> None:
    assert error_of(World().chat(top_logprobs=2))["param"] == "top_logprobs"


def test_an_impossible_token_has_a_finite_logprob() -> None:
    """JSON has no infinity; a null there would break clients that add them up."""
    infinite = Event(tokens=[Choice(97, float("-inf"))], finish_reason=LENGTH)
    body = World(lambda _: [ACCEPTED, infinite]).chat(logprobs=True).json()
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_special_tokens_are_shown_only_if_asked_for() -> None:
    def script(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        yield Event(tokens=[Choice(BOS), *choices("a"), Choice(EOS)], finish_reason=STOP)

    shown = World(script).chat(skip_special_tokens=False).json()["choices"][0]["message"]
    hidden = World(script).chat().json()["choices"][0]["message"]
    assert (shown["content"], hidden["content"]) == ("<s>a", "a")


def test_the_openai_client_reads_answers_and_errors() -> None:
    async def play(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer.choices[0].message.content == "Hello"
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="served: tiny"):
            await client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="tiny", prompt="x" * 5000)
        assert caught.value.code == "context_length_exceeded"

    asyncio.run(World(saying("Hello")).with_openai(play))
