"""What a client wants an answer to be: from request fields to grammars.

OpenAI, vLLM and llama.cpp spell the same wishes differently. Not here: the grammars themselves
(`grammars.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from actors.grammar import check_size
from actors.vetting import Vetting
from serving.grammars import (
    Calls,
    Content,
    Tool,
    any_object_content,
    arguments_grammar,
    choice_content,
    grammar_content,
    json_content,
    json_text_content,
    regex_content,
)
from serving.openai import (
    ChatRequest,
    GuidedRequest,
    JsonObject,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
)
from serving.tool_formats import ToolFormat
from sharding.errors import RequestError

_SPELLINGS: dict[str, Callable[[Any], Content | None]] = {
    "response_format": lambda value: _of_response_format(value),
    "structured_outputs": lambda value: _of_structured_outputs(value),
    "guided_json": lambda value: _of_json(value),
    "guided_regex": regex_content,
    "guided_choice": lambda value: _of_choice(value),
    "guided_grammar": grammar_content,
    "grammar": grammar_content,
    "json_schema": json_content,
}


def content_wish(body: GuidedRequest) -> tuple[Content | None, str | None]:
    """What the content shall be, for `answer_grammar`, and the field that says so; None: anything.
    Raises `RequestError` for wishes that contradict or that no grammar can hold."""
    wishes: dict[str, Content] = {}
    for name, read in _SPELLINGS.items():
        value = getattr(body, name)
        if value is None or value == "":
            continue
        try:
            content = read(value)
        except (ValueError, RecursionError, RequestError) as error:
            raise RequestError(f"{name} cannot be used: {error}", name) from error
        if content is not None:
            wishes[name] = content
    if len(wishes) > 1:
        raise RequestError(f"only one of {', '.join(wishes)} can be followed", [*wishes][1])
    return next(((content, name) for name, content in wishes.items()), (None, None))


def _of_response_format(wish: ResponseFormat) -> Content | None:
    if wish.type == "text":
        return None
    if wish.type == "json_object":
        return json_content(wish.schema_) if wish.schema_ else any_object_content()
    if wish.json_schema is None or wish.json_schema.schema_ is None:
        raise ValueError("its type json_schema needs json_schema with a schema")
    return json_content(wish.json_schema.schema_)


def _of_structured_outputs(wish: StructuredOutputs) -> Content | None:
    found = [
        *([] if wish.json_ is None else [_of_json(wish.json_)]),
        *([any_object_content()] if wish.json_object else []),
        *([] if wish.regex is None else [regex_content(wish.regex)]),
        *([] if wish.choice is None else [_of_choice(wish.choice)]),
        *([] if wish.grammar is None else [grammar_content(wish.grammar)]),
    ]
    if unknown := sorted(wish.model_extra or {}):
        raise ValueError(f"{', '.join(unknown)} is not supported")
    if len(found) > 1:
        raise ValueError("it says more than one thing")
    return found[0] if found else None


def _of_json(schema: JsonObject | str) -> Content:
    if isinstance(schema, str):
        check_size(schema)
        return json_text_content(schema)
    return json_content(schema)


def _of_choice(choices: list[str]) -> Content:
    if not choices:
        raise ValueError("it leaves nothing to choose")
    return choice_content(choices)


def calls_wish(body: ChatRequest, form: ToolFormat) -> Calls | None:
    """What may be called; None: nothing. Raises `RequestError` if that is what must be."""
    choice, tools = body.tool_choice, body.tools or []
    names = [tool.function.name for tool in tools]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RequestError(f"tools: {min(repeated)} is there more than once", "tools")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            message = f"tool_choice names {choice.function.name:.200}, which is not among the tools"
            raise RequestError(message, "tool_choice")
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    elif choice == "required" and not tools:
        raise RequestError("tool_choice required needs tools", "tool_choice")
    if not tools or choice == "none":
        return None
    for i, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            field = f"tools[{i}].function.parameters"
            raise RequestError(f"{field}: arguments are an object, not {kind!r:.60}", field)
    return Calls(
        [
            Tool(tool.function.name, tool.function.parameters, tool.function.strict is True)
            for tool in tools
        ],
        form,
        needed=choice not in (None, "auto"),
        several=body.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
    )


def vet(grammar: str, vetting: Vetting, param: str | None) -> None:
    """Raises `RequestError`, with the field that it came from, for a grammar that cannot be
    used."""
    try:
        check_size(grammar)
        vetting.check(grammar)
    except RequestError as error:
        raise RequestError(str(error), param) from None


def loosened(calls: Calls, vetting: Vetting) -> Calls:
    """Without the schemas that no grammar can keep to, of tools that are not strict: their
    arguments are then any object."""
    return replace(calls, tools=[_loosened(tool, vetting) for tool in calls.tools])


def _loosened(tool: Tool, vetting: Vetting) -> Tool:
    if not tool.strict:
        try:
            vet(arguments_grammar(tool), vetting, None)
        except RequestError:
            return replace(tool, parameters={"additionalProperties": True})
    return tool
