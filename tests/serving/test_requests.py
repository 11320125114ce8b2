"""Bodies are judged strictly, unsupported fields by name, and defaults are what clients expect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from serving.openai import ChatRequest, CompletionRequest
from serving.prepare import UNSUPPORTED
from sharding.batch import SamplingParams
from tests.serving.fakes import BOS, EOS, IM_END, World, error_of

WRONG: list[tuple[str, object]] = [
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", 2.1),
    ("temperature", -0.1),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 2.1),
    ("repeat_penalty", 0),
    ("n", 0),
    ("n", 9),
    ("n", True),
    ("best_of", 2),
    ("seed", 2**63),
    ("seed", "1"),
    ("max_tokens", -1),
    ("max_completion_tokens", 0),
    ("min_tokens", -1),
    ("stop", 5),
    ("stop", ""),
    ("stop", ["x"] * 17),
    ("stop_token_ids", [260]),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"260": 1}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"+5": 1}),
    ("logit_bias", [5]),
    ("logprobs", 21),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("user", 5),
    ("prompt", 5),
    ("prompt", None),
    ("prompt", []),
    ("prompt", [260]),
    ("prompt", [[1], [260]]),
    ("echo", "yes"),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_out_of_type_or_range_is_400_and_named(field: str, value: object) -> None:
    response = World().post("/v1/completions", {"prompt": "x", field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == field
    assert field in error["message"]


MANY = 100_000


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [5] * MANY}]},
        {"messages": [{"role": "user", "content": [{"type": 5}] * MANY}]},
        {"messages": [5] * MANY},
        {"prompt": [5.5] * MANY},
        {"prompt": [[-1] * MANY]},
        {"prompt": [["x"]] * MANY},
        {"prompt": "x", "stop": [5] * MANY},
        {"prompt": "x", "stop_token_ids": ["5"] * MANY},
        {"prompt": "x", "logit_bias": {f"x{number}": 1 for number in range(MANY)}},
        {"prompt": "x", "logit_bias": {str(number): "1" for number in range(MANY)}},
    ],
    ids=lambda body: next(reversed(body)),
)
def test_a_body_is_given_up_at_its_first_fault(body: dict[str, object]) -> None:
    """To word a fault for each of millions of entries keeps everybody waiting for minutes."""
    with pytest.raises(ValidationError) as refused:
        (ChatRequest if "messages" in body else CompletionRequest).model_validate(body)
    assert refused.value.error_count() < 10


def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megabytes take seconds, of a thread that others wait for."""
    world = World()
    monkeypatch.setattr(world.service.tokenizer, "encode", None)
    text = "x" * (4097 * world.service.tokenizer.most_bytes)
    for path, body in (
        ("/v1/completions", {"prompt": ["short", text]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        error = error_of(world.post(path, body))
        assert error["code"] == "context_length_exceeded"
        assert "4096" in error["message"] and "at least 4097 tokens" in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    """Python's JSON reader takes them; a NaN temperature would poison the sampler."""
    body = f'{{"prompt": "x", "temperature": {number}}}'.encode()
    response = World().request("POST", "/v1/completions", body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["x", 1]}, "prompt[1]"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop[1]"),
        ({"prompt": "x", "stop_token_ids": [1, "2"]}, "stop_token_ids[1]"),
    ],
)
def test_the_item_at_fault_is_named(body: dict[str, object], param: str) -> None:
    assert error_of(World().post("/v1/completions", body))["param"] == param


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_a_known_field_that_is_not_supported_is_refused_by_name(field: str) -> None:
    """Silence would look like support: a response_format that is ignored breaks its client."""
    response = World().complete(**{field: {"some": "thing"}})
    assert response.status_code == 400
    assert error_of(response)["param"] == field
    assert field in error_of(response)["message"]


@pytest.mark.parametrize(
    ("field", "neutral"), [(f, v) for f in UNSUPPORTED for v in UNSUPPORTED[f]]
)
def test_its_neutral_values_pass(field: str, neutral: object) -> None:
    """Clients send their defaults: `tools: []`, `response_format: {"type": "text"}`."""
    assert World().complete(**{field: neutral}).status_code == 200


def test_unknown_fields_are_ignored() -> None:
    assert World().complete(metadata={"a": "b"}, x_custom=[1, None]).status_code == 200


def test_null_means_the_default() -> None:
    fields = ["temperature", "top_p", "n", "seed", "stop", "max_tokens", "logit_bias", "stream"]
    assert World().complete(**dict.fromkeys(fields)).status_code == 200


def sampling(**fields: object) -> SamplingParams:
    world = World()
    assert world.complete(**fields).status_code == 200
    return world.engine.requests[0].sampling


def test_fields_reach_the_engine() -> None:
    asked = sampling(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"65": -100},
        seed=-5,
        min_tokens=2,
        stop_token_ids=[66],
    )
    assert asked == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={65: -100.0},
        seed=-5,
        min_tokens=2,
        stop_ids=(EOS, IM_END, 66),
    )


def test_defaults_are_openais() -> None:
    asked = sampling(seed=0)
    assert asked == SamplingParams(stop_ids=(EOS, IM_END))


def test_both_spellings_of_the_repetition_penalty_are_understood() -> None:
    assert sampling(repeat_penalty=1.2).repetition_penalty == 1.2
    assert sampling(repeat_penalty=1.2, repetition_penalty=1.2).repetition_penalty == 1.2
    response = World().complete(repeat_penalty=1.2, repetition_penalty=1.3)
    assert error_of(response)["param"] == "repeat_penalty"


def test_top_k_minus_one_switches_it_off() -> None:
    assert sampling(top_k=-1).top_k == 0


def test_ignore_eos_leaves_only_the_stop_tokens_that_were_asked_for() -> None:
    assert sampling(ignore_eos=True, stop_token_ids=[66]).stop_ids == (66,)


def test_max_completion_tokens_wins() -> None:
    world = World()
    world.complete(max_tokens=5, max_completion_tokens=6)
    assert world.engine.requests[0].max_tokens == 6


def test_an_answer_may_fill_what_is_left_of_the_context() -> None:
    world = World()
    world.complete("x" * 95)
    assert world.engine.requests[0].max_tokens == 4096 - 96


def test_a_prompt_and_answer_beyond_the_context_are_refused_with_both_numbers() -> None:
    response = World().complete("x" * 95, max_tokens=4001)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "4096" in error["message"]
    assert "4097" in error["message"]
    assert World().complete("x" * 95, max_tokens=4000).status_code == 200


def test_a_prompt_that_fills_the_context_leaves_no_room_to_answer() -> None:
    assert error_of(World().complete("x" * 4095))["code"] == "context_length_exceeded"


def test_a_request_that_bans_every_token_is_refused() -> None:
    """Nothing that would pass by itself: clients try a 503 again."""
    everything = list(range(260))
    banning = World().complete(stop_token_ids=everything, min_tokens=1, max_tokens=2)
    assert (banning.status_code, error_of(banning)["param"]) == (400, "stop_token_ids")
    assert World().complete(stop_token_ids=everything, max_tokens=2).status_code == 200
    but_one = World().complete(stop_token_ids=everything[:-1], min_tokens=1, ignore_eos=True)
    assert but_one.status_code == 200


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    assert error_of(World().complete(max_tokens=2, min_tokens=3))["param"] == "min_tokens"


def test_a_new_context_counts_at_once() -> None:
    """How long a context fits is known only after loading; the first guess must not stay."""
    world = World()
    model = world.service.model
    world.service.model = type(model)(model.name, 100, model.created, model.fingerprint)
    assert error_of(world.complete("x" * 101))["code"] == "context_length_exceeded"


def test_choices_draw_with_following_seeds_that_wrap() -> None:
    world = World()
    world.complete(n=3, seed=2**63 - 2)
    seeds = [request.sampling.seed for request in world.engine.requests]
    assert sorted(seeds) == [-(2**63), 2**63 - 2, 2**63 - 1]


def test_a_prompt_draws_the_same_alone_and_among_others() -> None:
    world = World()
    world.complete(["a", "b"], seed=7)
    assert [request.sampling.seed for request in world.engine.requests] == [7, 7]


def test_without_a_seed_every_answer_has_its_own() -> None:
    """Identical prompts of one request would all get the same answer."""
    world = World()
    world.complete(["a", "a"], n=2)
    assert len({request.sampling.seed for request in world.engine.requests}) == 4


def test_request_ids_are_unique() -> None:
    world = World()
    world.complete(["a", "b"], n=4)
    assert len({request.request_id for request in world.engine.requests}) == 8


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [[BOS, 104, 105]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_a_prompt_has_four_forms(prompt: object, ids: list[list[int]]) -> None:
    world = World()
    assert world.complete(prompt).status_code == 200
    assert [request.prompt for request in world.engine.requests] == ids


def test_too_many_answers_are_refused() -> None:
    response = World().complete(["x"] * 200, n=8)
    assert "1600" in error_of(response)["message"] or "200 prompts" in error_of(response)["message"]


def _slow(world: World, seconds: float) -> Callable[..., list[int]]:
    encode = world.service.tokenizer.encode

    def slow(text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        time.sleep(seconds)
        return encode(text, add_special=add_special, parse_special=parse_special)

    return slow


def test_others_are_served_while_a_long_prompt_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding a book takes seconds; on the event loop it would stop every other stream."""
    world = World()
    monkeypatch.setattr(world.service.tokenizer, "encode", _slow(world, 0.5))
    done: list[str] = []

    async def run() -> None:
        async with world.client() as client:

            async def ask(name: str, method: str, path: str, body: object) -> None:
                await client.request(method, path, json=body)
                done.append(name)

            slow = ask("long", "POST", "/v1/completions", {"prompt": "a book"})
            await asyncio.gather(slow, ask("short", "GET", "/v1/models", None))

    asyncio.run(run())
    assert done == ["short", "long"]


def test_half_a_surrogate_pair_in_a_name_is_quoted_and_not_a_500() -> None:
    """The answer quotes the model's name, and UTF-8 cannot carry this one."""
    answer = World().request(
        "POST", "/v1/completions", rb'{"model": "\ud800", "prompt": "x", "max_tokens": 1}'
    )
    assert answer.status_code == 404
    assert "\\ud800" in error_of(answer)["message"]


def test_echo_is_refused_where_it_means_nothing() -> None:
    answer = World().chat(echo=True)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "echo"


@pytest.mark.parametrize("field", ["priority", "tools"])
def test_false_is_not_nought(field: str) -> None:
    value = False if field == "priority" else 0
    answer = World().complete(**{field: value})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == field


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})]
)
def test_tokens_of_a_model_that_is_not_served_are_not_found(
    path: str, body: dict[str, object]
) -> None:
    assert World().post(path, {"model": "another", **body}).status_code == 404
    assert World().post(path, body).status_code == 200
