"""Answers have the form that was asked for, whichever of its spellings a client uses."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tests.serving.fakes import error_of, frames
from tests.serving.guided import GuidedWorld

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20, "description": "no rule"},
        "title": {"enum": ["capital", "town"]},
    },
    "required": ["city", "title"],
    "additionalProperties": False,
}
AS_SCHEMA = r'\{"city": ".*", "title": "(capital|town)"\}'
GBNF = 'root ::= "It is " [0-9]+ "."'
NAMED = {"name": "place", "schema": SCHEMA}

SPELLINGS = [
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, AS_SCHEMA),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, AS_SCHEMA),
    ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    ({"json_schema": SCHEMA}, AS_SCHEMA),
    ({"guided_json": SCHEMA}, AS_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, AS_SCHEMA),
    ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
    ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
    ({"guided_regex": "^a/b[0-9]{3}$"}, "a/b[0-9]{3}"),
    ({"structured_outputs": {"regex": "(x|y)+\\$"}}, r"[xy]+\$"),
    ({"guided_choice": ['the "sea"', "hills\n"]}, 'the "sea"|hills\n'),
    ({"structured_outputs": {"choice": ["one"]}}, "one"),
    ({"grammar": GBNF}, r"It is [0-9]+\."),
    ({"guided_grammar": 'start: "no" | "yes"'}, "no|yes"),
    ({"structured_outputs": {"grammar": GBNF}}, r"It is [0-9]+\."),
]


@pytest.fixture(scope="module")
def world() -> GuidedWorld:
    return GuidedWorld()


@pytest.mark.parametrize(("fields", "form"), SPELLINGS)
def test_answers_have_the_form(world: GuidedWorld, fields: dict[str, Any], form: str) -> None:
    for seed in range(3):
        asked = {**fields, "seed": seed, "max_tokens": 2000}
        choice = world.chat(**asked).json()["choices"][0]
        plain = world.complete(**asked).json()["choices"][0]
        for text in (choice["message"]["content"], plain["text"]):
            assert re.fullmatch(form, text, re.DOTALL), text
            if form.startswith(r"\{"):
                json.loads(text)
        assert choice["finish_reason"] == plain["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "grammar": "", "structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
        {"tools": [], "tool_choice": "none"},
    ],
)
def test_who_asks_for_nothing_is_not_bound(world: GuidedWorld, fields: dict[str, Any]) -> None:
    assert world.chat(**fields).status_code == 200
    assert world.engine.requests[-1].grammar == ""


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "needs json_schema with a schema",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "thing"}}},
            "response_format",
            "Invalid type: thing",
        ),
        ({"json_schema": {"not": {}}}, "json_schema", 'Unimplemented keys: ["not"]'),
        ({"guided_json": "{"}, "guided_json", "cannot be used"),
        ({"guided_json": "[]"}, "guided_json", "no JSON object"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "nothing to choose"),
        ({"grammar": "root ::= that"}, "grammar", "Rule 'that' not found"),
        ({"grammar": "start: that"}, "grammar", 'unknown name: "that"'),
        ({"grammar": "@"}, "grammar", "cannot be used"),
        ({"grammar": ' {"grammars": []}'}, "grammar", "neither GBNF nor Lark"),
        ({"grammar": f'root ::= "{"x" * 20_000}"'}, "grammar", "more than 16384"),
        ({"grammar": "root ::= " + "(" * 3000}, "grammar", "cannot be used"),
        ({"guided_choice": ["x" * 200_000]}, "guided_choice", "more than 131072"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "only one of"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "one thing",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    world: GuidedWorld, fields: dict[str, Any], param: str, words: str
) -> None:
    for answer in (world.chat(**fields), world.complete(**fields)):
        assert answer.status_code == 400
        error = error_of(answer)
        assert error["param"] == param and words in error["message"], error


def test_the_openai_client_parses_what_it_asked_for(world: GuidedWorld) -> None:
    class Place(BaseModel):
        city: str
        large: bool
        near: list[int]

    async def play(client: openai.AsyncOpenAI) -> None:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Where?"}]
        answer = await client.chat.completions.parse(
            model="tiny", messages=messages, response_format=Place, seed=5
        )
        assert isinstance(answer.choices[0].message.parsed, Place)
        async with client.chat.completions.stream(
            model="tiny", messages=messages, response_format=Place, seed=5
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == answer.choices[0].message.parsed

    asyncio.run(world.with_openai(play))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" /x+/ /x+/',
        '%llguidance {"no_forcing": false}\nstart: "a" /x+/ /x+/',
        'start: content\ncontent: "a" /x+/ /x+/',
    ],
)
def test_a_grammar_that_never_ends_ends_with_its_tokens(world: GuidedWorld, grammar: str) -> None:
    """Nothing but x can follow, for ever: who looks where that ends does not come back."""
    choices = [
        world.chat(grammar=grammar, max_tokens=9).json()["choices"][0],
        world.complete(grammar=grammar, max_tokens=9).json()["choices"][0],
    ]
    for choice in choices:
        assert choice["finish_reason"] == "length"
    assert re.fullmatch("ax{8,}", choices[0]["message"]["content"])
    assert re.fullmatch("ax{8,}", choices[1]["text"])


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": 'content: "a" /x+/ /x+/'},
        {"grammar": '{"grammars": [{"lark_grammar": "start: \\"a\\" /x+/ /x+/"}]}'},
        {
            "grammar": "start: a0\n"
            + "\n".join(f"a{i}: a{i + 1}" for i in range(3000))
            + '\na3000: "x"'
        },
        {
            "json_schema": {
                "$ref": "#/$defs/d0",
                "$defs": {
                    **{f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(1500)},
                    "d1500": {},
                },
            }
        },
        {"json_schema": {"type": "integer", "multipleOf": 9999991}},
        {"grammar": "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(3000))},
    ],
    ids=["own rule", "own notation", "chain", "references", "multiple", "GBNF chain"],
)
def test_what_would_end_or_stop_a_server_is_refused(
    world: GuidedWorld, fields: dict[str, Any]
) -> None:
    """It ends a process that nobody misses, and the next one is read."""
    for answer in (world.chat(**fields), world.complete(**fields)):
        assert answer.status_code == 400
        assert error_of(answer)["param"] == [*fields][0]
    assert world.chat(guided_choice=["yes"]).json()["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"guided_choice": [""]}, ""), ({"guided_regex": ""}, ""), ({"grammar": 'start: ""'}, "")],
)
def test_what_is_complete_at_once_says_nothing(
    world: GuidedWorld, fields: dict[str, Any], text: str
) -> None:
    if fields == {"guided_regex": ""}:
        fields = {"structured_outputs": {"regex": ""}}
    choice = world.chat(**fields).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_rules_of_llama_cpp_give_back_what_a_later_rule_needs(world: GuidedWorld) -> None:
    """Its own grammar for arithmetic: a number takes spaces behind it, and a line ends with one."""
    world.engine.begin = "a +1= 3\n"
    grammar = (
        'root  ::= (expr "=" ws term "\\n")+\nexpr  ::= term ([-+*/] term)*\n'
        'term  ::= ident | num | "(" ws expr ")" ws\nident ::= [a-z] [a-z0-9_]* ws\n'
        "num   ::= [0-9]+ ws\nws    ::= [ \\t\\n]*"
    )
    content = world.chat(grammar=grammar, max_tokens=200).json()["choices"][0]["message"]["content"]
    assert content.startswith("a +1= 3\n")


def test_words_about_a_schema_are_no_part_of_it(world: GuidedWorld) -> None:
    """However many, and whatever they say to the library; but a field may have any name."""
    schema = {
        "description": "x" * 200_000,
        "type": "object",
        "x-guidance": {"item_separator": "; ", "key_separator": "="},
        "properties": {"title": {"const": 1}, "description": {"const": 2}, "default": {"const": 3}},
        "required": ["title", "description", "default"],
        "additionalProperties": False,
    }
    content = world.chat(json_schema=schema).json()["choices"][0]["message"]["content"]
    assert content == '{"title": 1, "description": 2, "default": 3}'


def test_a_cut_answer_says_so(world: GuidedWorld) -> None:
    choice = world.chat(json_schema=SCHEMA, max_tokens=3).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_a_stream_says_the_same_as_a_whole(world: GuidedWorld) -> None:
    fields: dict[str, Any] = {"json_schema": SCHEMA, "seed": 9}
    whole = world.chat(**fields).json()["choices"][0]
    chunks = frames(world.chat(**fields, stream=True))
    assert chunks.pop() == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]


THINKS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ begin }}"


@pytest.mark.parametrize(
    ("begin", "says", "reasoning"),
    [
        ("", "<think>\nhm, 7 </thin or\n</think>\n\n", "hm, 7 </thin or"),
        ("", "7", None),
        ("<think>\n", "hm\n</think>", "hm"),
        ("<think></think>\n", "<think>", None),
    ],
)
def test_a_model_thinks_before_it_says_what_was_asked_for(
    begin: str, says: str, reasoning: str | None
) -> None:
    """Where it begins on its own, where its prompt begins it, and where its prompt ends it; whole
    and streamed."""
    world = GuidedWorld(THINKS)
    world.engine.begin = says
    fields: dict[str, Any] = {
        "guided_regex": r"\d+",
        "chat_template_kwargs": {"begin": begin},
        "seed": 3,
    }
    message = world.chat(**fields).json()["choices"][0]["message"]
    assert re.fullmatch(r"\d+", message["content"])
    assert message.get("reasoning_content") == reasoning
    assert world.prompt.endswith(begin)
    deltas = [c["choices"][0]["delta"] for c in frames(world.chat(**fields, stream=True))[:-1]]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == (message.get(name) or "")


def test_thoughts_are_given_back_to_the_template() -> None:
    world = GuidedWorld(
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    )
    message = {"role": "assistant", "content": "So.", "reasoning_content": "hm"}
    assert world.chat(messages=[message]).status_code == 200
    assert world.prompt == "hm|So."


def test_a_template_is_not_given_what_it_is_given_anyway() -> None:
    world = GuidedWorld("{{ messages[0].content }}{{ add_generation_prompt }}{{ mood }}")
    more = {"messages": [], "add_generation_prompt": 3, "mood": "!"}
    assert world.chat("hi", chat_template_kwargs=more).status_code == 200
    assert world.prompt == "hiTrue!"
