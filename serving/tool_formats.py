"""How models are told of tools, and how they call them: a row of data for each way.

A model calls tools in the form that its chat template was trained with; the template's source
tells which. Where a template knows none, tools are described in the conversation itself. Not here:
the grammar of calls (`grammars.py`) and reading them (`message.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, object]


@dataclass(frozen=True)
class ToolFormat:
    """A call is `head NAME middle ARGUMENTS tail`, arguments a JSON object; calls are
    `marker opening CALL (between CALL)* closing`.

    `known_by`: what a template's source holds. `marker`: what begins the calls behind other text;
    empty: an answer that begins with `head` is a call, and there is no other text. `between`: empty
    if there can be but one. `id_chars`: how long the ids of calls must be. `in_system`: whether the
    template looks for tools in the system message.
    """

    known_by: tuple[str, ...]
    marker: str
    opening: str
    closing: str
    between: str = ", "
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}"
    id_chars: int = 24
    in_system: bool = False


_MISTRAL_ARGS = ToolFormat(
    ("[TOOL_CALLS]", "[ARGS]"),
    "[TOOL_CALLS]",
    opening="",
    closing="",
    between="[TOOL_CALLS]",
    head="",
    middle="[ARGS]",
    tail="",
    id_chars=9,
)
_MISTRAL = ToolFormat(("[TOOL_CALLS]",), "[TOOL_CALLS]", opening="[", closing="]", id_chars=9)
_PHI = ToolFormat(
    ("<|tool|>",), "<|tool_call|>", opening="[", closing="]<|/tool_call|>", in_system=True
)
_HERMES = ToolFormat(
    ("<tool_call>", "</tool_call>", "tools"),
    "<tool_call>",
    opening="\n",
    closing="\n</tool_call>",
    between="\n</tool_call>\n<tool_call>\n",
)
_LLAMA = ToolFormat(
    ('"name": function name', '"parameters"'),
    "",
    opening="",
    closing="",
    between="",
    middle='", "parameters": ',
)
_FORMATS = (_MISTRAL_ARGS, _MISTRAL, _PHI, _HERMES, _LLAMA)

TOLD = _HERMES
"""The form of calls that a conversation itself asks for where the template knows none."""


_FIRST_READ = ("system", "developer", "user")


def format_of(template: str) -> ToolFormat | None:
    """The form that a template was made for; None: it knows no tools."""
    if "<function=" in template:  # arguments in tags, which nothing here reads
        return None
    known = (each for each in _FORMATS if all(word in template for word in each.known_by))
    return next(known, None)


def with_tools_told(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]]
) -> list[Message]:
    """A conversation for a template that knows no tools: they are described before its first words,
    calls and results are text of the assistant and of the user."""
    told = _in_words(messages)
    if not tools:
        return told
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    words = (
        "You can call these functions, described one to a line:\n"
        f"{lines}\n\n"
        "To call one, answer with nothing but its name and arguments as JSON:\n"
        '<tool_call>\n{"name": "the function", "arguments": {"argument": "value"}}\n</tool_call>\n'
        "Its result then comes between <tool_response> and </tool_response>. "
        "Call functions only where they help; else answer as usual."
    )
    first = next((i for i, each in enumerate(told) if each["role"] in _FIRST_READ), None)
    if first is None:
        return [{"role": "user", "content": words}, *told]
    told[first] = {**told[first], "content": f"{words}\n\n{told[first]['content']}"}
    return told


def _in_words(messages: Sequence[Message]) -> list[Message]:
    """Calls and results as text; results in a row as one message, since many templates want user
    and assistant in turn."""
    told: list[Message] = []
    results = False  # whether the last message holds some
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if results:
                text = f"{told.pop()['content']}\n{text}"
            told.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            assert isinstance(calls, list), "made by chat.py"
            texts = [str(message["content"]), *(_call_in_words(call) for call in calls)]
            told.append({"role": "assistant", "content": "\n".join(filter(None, texts))})
        else:
            told.append(message)
        results = message["role"] == "tool"
    return told


def _call_in_words(call: Mapping[str, Mapping[str, object]]) -> str:
    function = call["function"]
    named = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(named, ensure_ascii=False)}\n</tool_call>"


def with_tools_in_system(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]]
) -> list[Message]:
    """A conversation whose system message carries the tools, as JSON text."""
    text = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    if messages and messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "tools": text}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": text}, *messages]
