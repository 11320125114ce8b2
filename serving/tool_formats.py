"""How models are told of tools, and how they call them: a row of data for each way.

A model calls tools in the form that its chat template was trained with; the template's source
tells which. Where a template knows none, tools are described in the conversation itself. Not here:
the grammar of calls (`grammars.py`) and reading them (`message.py`).
"""

from __future__ import annotations

import hashlib
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


_SHORT_ID_CHARS = 9
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
    """Calls and results as text; results in a row, and what the user says to them, as one message,
    since many templates want user and assistant in turn."""
    told: list[Message] = []
    results = False  # whether the last message ends with some
    for message in with_calls_told(messages, TOLD):
        is_result = message["role"] == "tool"
        text = str(message["content"])
        if is_result:
            text = f"<tool_response>\n{text}\n</tool_response>"
        if results and message["role"] in ("tool", "user"):
            text = f"{told.pop()['content']}\n{text}"
            told.append({"role": "user", "content": text})
        else:
            told.append({"role": "user", "content": text} if is_result else message)
        results = is_result
    return told


def with_calls_told(messages: Sequence[Message], form: ToolFormat) -> list[Message]:
    """A conversation whose calls are text of the assistant, as it says them itself."""
    told: list[Message] = []
    for message in messages:
        calls = _calls(message)
        if calls:
            said = form.between.join(_said(call, form) for call in calls)
            said = f"{form.marker}{form.opening}{said}{form.closing}"
            text = "\n".join(filter(None, [str(message["content"]), said]))
            message = {"role": "assistant", "content": text}
        told.append(message)
    return told


def _calls(message: Message) -> list[Mapping[str, Mapping[str, object]]]:
    calls = message.get("tool_calls", [])
    assert isinstance(calls, list), "made by conversation.py"
    return calls


def _said(call: Mapping[str, Mapping[str, object]], form: ToolFormat) -> str:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{form.head}{function['name']}{form.middle}{arguments}{form.tail}"


def with_single_calls(messages: Sequence[Message]) -> list[Message]:
    """A conversation in which no message has more than one call: each is followed by its result."""
    told: list[Message] = []
    todo = list(messages)
    while todo:
        message = todo.pop(0)
        calls = _calls(message)
        if len(calls) < 2:
            told.append(message)
            continue
        results = []
        while todo and todo[0]["role"] == "tool":
            results.append(todo.pop(0))
        for i, call in enumerate(calls):
            content = message["content"] if i == 0 else ""
            told.append({**message, "content": content, "tool_calls": [call]})
            told += results[i : i + 1]
        told += results[len(calls) :]
    return told


def with_ids_of(messages: Sequence[Message], form: ToolFormat) -> list[Message]:
    """A conversation whose calls have ids as the template takes them, wherever they are from."""
    if form.id_chars != _SHORT_ID_CHARS:
        return list(messages)
    told: list[Message] = []
    for message in messages:
        changed = dict(message)
        if "tool_call_id" in changed:
            changed["tool_call_id"] = _short_id(changed["tool_call_id"])
        if calls := _calls(message):
            changed["tool_calls"] = [{**call, "id": _short_id(call.get("id"))} for call in calls]
        told.append(changed)
    return told


def _short_id(given: object) -> str:
    text = str(given)
    if len(text) == _SHORT_ID_CHARS and text.isalnum() and text.isascii():
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_SHORT_ID_CHARS]


def with_tools_in_system(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]]
) -> list[Message]:
    """A conversation whose system message carries the tools, as JSON text."""
    text = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    if messages and messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "tools": text}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": text}, *messages]
