"""POST /v1/completions as clients see it, whole answers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from actors.request import LENGTH, Event, GenerateRequest
from tests.serving.fakes import ACCEPTED, BOS, Step, World, choices, error_of, saying, scored


def repeating(request: GenerateRequest) -> Iterable[Step]:
    """Draws the last token of the prompt again."""
    yield ACCEPTED
    yield Event(tokens=choices(chr(request.prompt[-1])), finish_reason=LENGTH)


def test_an_answer_has_openais_shape() -> None:
    body = World(saying("Hello")).complete("hi").json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["prompt_tokens"] == 3


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt() -> None:
    answers = World(repeating).complete(["a", "b"], n=2).json()["choices"]
    assert [(a["index"], a["text"]) for a in answers] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_usage_adds_up_the_prompts() -> None:
    usage = World(repeating).complete(["a", "bc"], n=2).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 4)


def test_echo_repeats_the_prompt_as_it_was_given() -> None:
    assert World(saying("!")).complete("hé", echo=True).json()["choices"][0]["text"] == "hé!"
    assert World(saying("!")).complete([104, 105], echo=True).json()["choices"][0]["text"] == "hi!"


def test_a_prompt_can_be_scored_without_drawing() -> None:
    """How lm-eval measures models."""
    world = World(scored)
    choice = world.complete([104, 105], echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"] == {
        "tokens": ["h", "i"],
        "token_logprobs": [None, -10.5],
        "top_logprobs": [None, {"x": -0.5, "i": -10.5}],
        "text_offset": [0, 1],
    }
    assert (world.engine.requests[0].max_tokens, world.engine.requests[0].prompt_logprobs) == (0, 1)


def test_scores_of_prompt_and_answer_are_one_list() -> None:
    """Offsets are characters of the choice's text; a token inside a character starts with it."""
    body = World(scored).complete("hé", echo=True, logprobs=0, max_tokens=2).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9", "a", "b"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 2, 3]
    assert logprobs["top_logprobs"][4] == {"a": -9.7}


@pytest.mark.parametrize("prompt", ["<|im_start|>hi<|im_end|><s>", "<s>hi", "<s>"])
def test_special_tokens_that_a_prompt_spells_out_have_their_place(prompt: str) -> None:
    """Evaluations look there for where the answer begins."""
    asked = World(scored).complete(prompt, echo=True, logprobs=0, max_tokens=2)
    choice = asked.json()["choices"][0]
    assert choice["text"] == prompt + "ab"
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert (names[0], offsets[0]) == ("<s>", 0), "put before it, and not part of it"
    for name, offset in zip(names[1:], offsets[1:], strict=True):
        assert choice["text"].startswith(name, offset), (name, offset)


def test_logprobs_without_echo_begin_at_the_answer() -> None:
    world = World(scored)
    logprobs = world.complete("hi", logprobs=1).json()["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["a", "b"], [0, 1])
    assert world.engine.requests[0].prompt_logprobs is None


def test_drawing_nothing_needs_echo() -> None:
    assert error_of(World().complete(max_tokens=0))["param"] == "max_tokens"
    assert World(scored).complete(max_tokens=0, echo=True).status_code == 200


def test_an_empty_prompt_of_tokens_is_refused() -> None:
    assert error_of(World().complete([[]]))["param"].startswith("prompt")


def test_an_empty_text_still_has_its_first_token() -> None:
    world = World()
    assert world.complete("").status_code == 200
    assert world.engine.requests[0].prompt == [BOS]


def test_missing_scores_are_an_error() -> None:
    """Lists of different lengths would shift every score by some tokens, silently."""
    assert World(repeating).complete("hi", echo=True, logprobs=1).status_code == 503
