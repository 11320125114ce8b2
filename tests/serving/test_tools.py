"""Tools are told and called in the form that each template was made for, and calls keep to their
schemas, whatever the model would say."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessage,
    ChatCompletionMessageParam,
)
from pydantic import TypeAdapter

from actors.grammar import Grammars
from tests.serving.fakes import error_of, frames
from tests.serving.guided import TALK, GuidedWorld

WEATHER: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
        },
    },
}
NOW: ChatCompletionFunctionToolParam = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]

# Of the words in them the form is known. What they print shows what they are given.
SHOWS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }}|{{ c.function | tojson }}]{% endfor %}"
    "{{ m.tools }};{% endfor %}"
)
TELLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + SHOWS
HERMES = TELLS + "{# <tool_call></tool_call> #}"
MISTRAL = TELLS + "{# [TOOL_CALLS] #}"
MISTRAL_ARGS = TELLS + "{# [TOOL_CALLS] [ARGS] #}"
PHI = TELLS + "{# <|tool|> #}"
LLAMA = TELLS + '{# {"name": function name, "parameters": dictionary } #}'
FORMS = {"none": TALK, "hermes": HERMES, "mistral": MISTRAL, "args": MISTRAL_ARGS, "phi": PHI}
FORMS["llama"] = LLAMA
MARKERS = ("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>")


@pytest.fixture(params=FORMS)
def world(request: pytest.FixtureRequest) -> GuidedWorld:
    """A model of each form whose markers are tokens of their own, where it has any."""
    return GuidedWorld(FORMS[request.param], *MARKERS)


def check_calls(message: dict[str, Any], names: set[str]) -> None:
    assert message["tool_calls"]
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        assert call["type"] == "function" and call["function"]["name"] in names
        if call["function"]["name"] == "now":
            assert arguments == {}
        else:
            assert list(arguments) == ["city", "unit"]
            assert len(arguments["city"]) <= 12 and arguments["unit"] in ("C", "F")
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_must_call_does(form: str, plain: bool) -> None:
    """`plain`: the markers are text in this vocabulary."""
    world = GuidedWorld(FORMS[form], *(() if plain else MARKERS))
    for seed in range(4):
        answer = world.chat(tools=TOOLS, tool_choice="required", seed=seed, max_tokens=2000)
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        check_calls(choice["message"], {"get_weather", "now"})


def test_the_named_tool_is_called_once(world: GuidedWorld) -> None:
    chosen = {"type": "function", "function": {"name": "now"}}
    message = world.chat(tools=TOOLS, tool_choice=chosen).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["now"]


def test_one_call_at_most(world: GuidedWorld) -> None:
    for seed in range(6):
        fields: dict[str, Any] = {
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "seed": seed,
        }
        message = world.chat(tools=TOOLS, **fields).json()["choices"][0]["message"]
        assert len(message["tool_calls"]) == 1


def test_an_answer_that_may_call_need_not(world: GuidedWorld) -> None:
    world.engine.begin = "It is late, {said} the <tool"
    fields: dict[str, Any] = {"tools": TOOLS, "seed": 4, "max_tokens": 40}
    choice = world.chat(**fields).json()["choices"][0]
    assert choice["message"]["content"].startswith("It is late, {said}")
    if choice["finish_reason"] == "stop":
        assert "tool_calls" not in choice["message"]


CALLS = {
    "none": 'Let me see.\n<tool_call>\n{"name": "get_w',
    "hermes": 'Let me see.\n\n<tool_call>\n{"name": "get_w',
    "mistral": 'Let me see.[TOOL_CALLS][{"name": "get_w',
    "args": "Let me see. [TOOL_CALLS]get_w",
    "phi": '<|tool_call|>[{"name": "get_w',
    "llama": '{"name": "get_w',
}


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_of_a_call_says_the_same_as_a_whole(form: str) -> None:
    world = GuidedWorld(FORMS[form], *MARKERS)
    world.engine.begin = CALLS[form]
    fields: dict[str, Any] = {"tools": TOOLS, "seed": 6, "max_tokens": 3000}
    whole = world.chat(**fields).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    check_calls(whole["message"], {"get_weather", "now"})
    chunks = frames(world.chat(**fields, stream=True))
    assert chunks.pop() == "[DONE]"
    assert chunks.pop()["choices"][0]["finish_reason"] == "tool_calls"
    content, calls = "", list[list[str]]()
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            function = call["function"]
            if call.keys() >= {"id", "type"}:
                calls.append([function["name"], ""])
            else:
                assert call.keys() == {"index", "function"} and function.keys() == {"arguments"}
            assert call["index"] == len(calls) - 1
            calls[-1][1] += function["arguments"]
    assert content == (whole["message"]["content"] or "")
    said = [call["function"] for call in whole["message"]["tool_calls"]]
    assert calls == [[call["name"], call["arguments"]] for call in said]
    assert ("Let me see." in content) == ("Let me see." in CALLS[form])


def again(message: ChatCompletionMessage) -> ChatCompletionMessageParam:
    """An answer as a client gives it back."""
    given: ChatCompletionMessageParam = TypeAdapter(
        ChatCompletionAssistantMessageParam
    ).validate_python(message.to_dict())
    return given


def test_the_openai_client_plays_a_whole_round(world: GuidedWorld) -> None:
    async def play(client: openai.AsyncOpenAI) -> None:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is Oslo?"}]
        first = await client.chat.completions.create(
            model="tiny", messages=messages, tools=TOOLS, tool_choice="required", seed=2
        )
        message = first.choices[0].message
        assert message.tool_calls
        messages.append(again(message))
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "warm"})
        async with client.chat.completions.stream(
            model="tiny", messages=messages, tools=TOOLS, max_tokens=50, seed=3
        ) as stream:
            await stream.get_final_completion()

    asyncio.run(world.with_openai(play))
    assert "warm" in world.prompt and "How is Oslo?" in world.prompt


ROUND: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "a",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Osl\\u00f8"}'},
            },
            {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "warm"}]},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "assistant", "content": "Warm."},
    {"role": "user", "content": "Thanks"},
]
TOLD = "".join(json.dumps(tool) for tool in TOOLS)
WARM = json.dumps({"name": "get_weather", "arguments": {"city": "Osl\u00f8"}}, ensure_ascii=False)
CALLED = f'[a|{WARM}][b|{{"name": "now", "arguments": {{}}}}]'


def test_a_template_that_knows_tools_gets_them_as_openai_has_them() -> None:
    """Arguments as objects: most templates would quote a text once more."""
    world = GuidedWorld(HERMES, *MARKERS)
    assert world.chat(messages=ROUND, tools=TOOLS).status_code == 200
    assert world.prompt == (
        f"{TOLD}system:Be brief.;user:Oslo?;assistant:{CALLED};tool:warm;tool:noon;"
        "assistant:Warm.;user:Thanks;"
    )


@pytest.mark.parametrize("form", ["mistral", "args"])
def test_ids_are_made_as_a_template_takes_them(form: str) -> None:
    """Nine letters, for calls and their results alike; those that are so stay."""
    world = GuidedWorld(FORMS[form] + "{% for m in messages %}<{{ m.tool_call_id }}>{% endfor %}")
    messages = json.loads(json.dumps(ROUND).replace('"b"', '"abcdefgh9"'))
    assert world.chat(messages=messages, tools=TOOLS).status_code == 200
    first, second = re.findall(r"\[(\w+)\|", world.prompt)
    assert re.fullmatch("[0-9a-f]{9}", first) and second == "abcdefgh9"
    assert f"<{first}><abcdefgh9>" in world.prompt


def test_a_template_of_single_calls_gets_them_one_by_one() -> None:
    world = GuidedWorld(LLAMA)
    assert world.chat(messages=ROUND, tools=TOOLS).status_code == 200
    weather, now = CALLED.split("][")
    assert world.prompt == (
        f"{TOLD}system:Be brief.;user:Oslo?;assistant:{weather}];tool:warm;assistant:[{now};"
        "tool:noon;assistant:Warm.;user:Thanks;"
    )


def test_a_template_that_prints_no_calls_gets_them_in_its_own_words() -> None:
    template = PHI.replace("tool_calls", "nothing")
    world = GuidedWorld(template, *MARKERS)
    assert world.chat(messages=ROUND, tools=TOOLS).status_code == 200
    assert f"assistant:<|tool_call|>[{WARM}, {{" in world.prompt


def test_a_template_that_prints_no_tools_is_told_in_words() -> None:
    """It looks like one that knows them, under another name for instance."""
    template = SHOWS + "{# <tool_call></tool_call> tools #}"
    world = GuidedWorld(template)
    assert world.chat(messages=ROUND, tools=TOOLS).status_code == 200
    assert "You can call these functions" in world.prompt


def test_a_template_that_looks_for_tools_in_the_system_message_finds_them_there() -> None:
    world = GuidedWorld(PHI, *MARKERS)
    tools = json.dumps([tool["function"] for tool in TOOLS])
    world.chat(messages=ROUND, tools=TOOLS)
    assert world.prompt.startswith(f"system:Be brief.{tools};user:Oslo?;assistant:{CALLED};")
    world.chat(messages=ROUND[1:2], tools=TOOLS)
    assert world.prompt == f"system:{tools};user:Oslo?;"
    world.chat(messages=ROUND[1:2])
    assert world.prompt == "user:Oslo?;"


def test_a_template_that_knows_no_tools_is_told_in_words() -> None:
    world = GuidedWorld(SHOWS)
    assert world.chat(messages=ROUND, tools=TOOLS).status_code == 200
    for tool in TOOLS:
        assert f"\n{json.dumps(tool)}\n" in world.prompt
    calls = f'<tool_call>\n{WARM}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}'
    assert world.prompt.startswith("system:You can call")
    assert world.prompt.endswith(
        f"\n\nBe brief.;user:Oslo?;assistant:{calls}\n</tool_call>;"
        "user:<tool_response>\nwarm\n</tool_response>\n<tool_response>\nnoon\n</tool_response>;"
        "assistant:Warm.;user:Thanks;"
    )
    world.chat(messages=ROUND[1:2], tools=TOOLS)
    assert world.prompt.startswith("user:You can call") and world.prompt.endswith("\n\nOslo?;")
    world.chat(messages=ROUND, tool_choice="none", tools=TOOLS)
    assert world.prompt.startswith("system:Be brief.;user:Oslo?;assistant:<tool_call>")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]", "pattern"),
        ({"tools": [NOW, NOW]}, "tools", "now is there more than once"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {
                "tools": [NOW],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            },
            "tool_choice",
            "get_weather, which is not among the tools",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": 1}}}]},
            "tools[0].function.parameters",
            "arguments are an object, not 1",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "x",
                            "strict": True,
                            "parameters": {
                                "properties": {"a": {"type": "array", "uniqueItems": True}}
                            },
                        },
                    }
                ]
            },
            "tools",
            "uniqueItems",
        ),
        (
            {"tools": [NOW], "response_format": {"type": "json_object", "schema": {"type": "x"}}},
            "response_format",
            "Invalid type",
        ),
        ({"functions": [{"name": "x"}]}, "functions", "not supported"),
        (
            {
                "messages": [
                    {**ROUND[2], "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "no JSON text",
        ),
        (
            {
                "messages": [
                    {**ROUND[2], "tool_calls": [{"function": {"name": "x", "arguments": "3"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "no JSON object",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_told(fields: dict[str, Any], param: str, words: str) -> None:
    answer = GuidedWorld().chat(**fields)
    assert answer.status_code == 400
    error = error_of(answer)
    assert str(error["param"]).startswith(param) and words in error["message"], error


def test_plain_completions_have_no_tools() -> None:
    assert error_of(GuidedWorld().complete(tools=[NOW]))["param"] == "tools"


def test_a_schema_that_cannot_be_kept_to_in_all_is_kept_to_in_the_rest() -> None:
    """Tools come from everywhere; who means it says `strict`."""
    schema = {
        "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}}},
        "required": ["a"],
    }
    tool = {"type": "function", "function": {"name": "x", "parameters": schema}}
    message = (
        GuidedWorld().chat(tools=[tool], tool_choice="required").json()["choices"][0]["message"]
    )
    for call in message["tool_calls"]:
        assert {type(each) for each in json.loads(call["function"]["arguments"])["a"]} <= {bool}


def test_content_may_have_a_form_where_tools_may_be_called() -> None:
    world = GuidedWorld(HERMES)
    for seed in range(8):
        fields: dict[str, Any] = {"tools": TOOLS, "guided_regex": "[0-9]{3}", "seed": seed}
        message = world.chat(**fields).json()["choices"][0]["message"]
        if "tool_calls" in message:
            check_calls(message, {"get_weather", "now"})
        else:
            assert len(message["content"]) == 3 and message["content"].isdigit()
    # JSON that is a call and JSON that is content could not be told apart.
    refused = GuidedWorld(LLAMA).chat(tools=TOOLS, response_format={"type": "json_object"})
    assert error_of(refused)["param"] == "response_format"


def test_thoughts_of_a_call_are_no_call() -> None:
    world = GuidedWorld(HERMES + "{# </think> #}")
    world.engine.begin = "<think>\nI could <tool_call> it.\n</think>\n\nNo."
    message = world.chat(tools=TOOLS, max_tokens=100).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "I could <tool_call> it."
    assert message["content"].startswith("No.")


def test_what_the_user_says_to_results_is_one_message_with_them() -> None:
    """Templates that want turns would refuse two of the user in a row."""
    world = GuidedWorld(SHOWS)
    messages = [*ROUND[1:4], {"role": "user", "content": "And?"}]
    assert world.chat(messages=messages).status_code == 200
    assert world.prompt.endswith("user:<tool_response>\nwarm\n</tool_response>\nAnd?;")


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/place", "$defs": {"place": WEATHER["function"]["parameters"]}},
        {"anyOf": [WEATHER["function"]["parameters"]]},
        {"type": "object", "properties": None, "required": None},
        {"type": "object", "properties": {"city": {"type": "string", "pattern": "^(?!a)b"}}},
        {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 9999991}}},
    ],
)
def test_schemas_of_other_makers(parameters: dict[str, object]) -> None:
    """Also those that no grammar can hold, or that would take minutes to read."""
    tool = {"type": "function", "function": {"name": "x", "parameters": parameters}}
    world = GuidedWorld(HERMES)
    world.engine.begin = '<tool_call>\n{"name": "x", "arguments": {'
    answer = world.chat(tools=[tool], tool_choice="required", max_tokens=400, seed=1)
    assert answer.status_code == 200, answer.json()
    (call, *_) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "x" and call["function"]["arguments"].startswith("{")
    if "$ref" in parameters or "anyOf" in parameters:
        assert list(json.loads(call["function"]["arguments"]))[:2] == ["city", "unit"]
    elif parameters.get("properties", {}) is None:
        assert call["function"]["arguments"] == "{}"


def test_a_marker_that_content_spells_is_content() -> None:
    """In JSON of a schema; and where the marker is a token, in any text as far as grammars go."""
    says = '{"a": "x <tool_call> y"}'
    world = GuidedWorld(HERMES)
    world.engine.begin = says
    fields: dict[str, Any] = {"tools": TOOLS, "response_format": {"type": "json_object"}}
    for stream in (False, True):
        answer = world.chat(**fields, stream=stream)
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in frames(answer)[:-1]]
            assert "".join(delta.get("content", "") for delta in deltas) == says
        else:
            assert answer.json()["choices"][0]["message"]["content"] == says
    world = GuidedWorld(MISTRAL, *MARKERS)
    world.engine.begin = "[TOOL"
    world.chat(tools=TOOLS, max_tokens=30)
    grammar = world.engine.requests[-1].grammar
    spelled = world.tokenizer.encode("x [TOOL_CALLS] y", add_special=False, parse_special=False)
    constraint = Grammars(lambda: world.tokenizer).compile(grammar)
    for token in spelled:
        if not constraint.allowed[token // 8] >> token % 8 & 1:
            break
        constraint.take(token, 0)
    else:
        raise AssertionError("the marker could be spelled")
