"""From the messages of a chat to the text of its prompt, through the model's template.

Not here: the template itself (`template.py`), how models call tools (`tool_formats.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from serving.grammars import Calls
from serving.openai import ChatMessage, ChatRequest, TextPart, ToolCall
from serving.prepare import check_length
from serving.service import Service
from serving.template import ChatTemplate, Message
from serving.tool_formats import (
    TOLD,
    ToolFormat,
    format_of,
    with_calls_told,
    with_ids_of,
    with_single_calls,
    with_tools_in_system,
    with_tools_told,
)
from serving.wishes import calls_wish
from sharding.errors import RequestError

_UNSUPPORTED_IN_MESSAGES = ("function_call", "audio")


class Conversation:
    """A chat's prompt. `text`: of the prompt. `calls`: what its answer may call, None for nothing.

    Raises `RequestError` and its kind for messages or tools that cannot be used.
    """

    def __init__(self, body: ChatRequest, service: Service, template: ChatTemplate) -> None:
        self._body, self._service, self._template = body, service, template
        known = format_of(template.source)
        self.calls: Calls | None = calls_wish(body, known or TOLD)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        self._tools: list[dict[str, object]] = [] if self.calls is None else tools
        self._messages = [_plain(message, i) for i, message in enumerate(body.messages)]
        for message in self._messages:
            check_length(str(message["content"]), service)
        if known is not None and self._tools and not self._prints_tools(known):
            known, self.calls = None, calls_wish(body, TOLD)
        self.text = self._told() if known is None else self._known(known, self._messages)

    def _prints_tools(self, form: ToolFormat) -> bool:
        """A template may look like one that knows tools, and yet print none of them."""
        probe = self._known(form, [{"role": "user", "content": ""}])
        return all(tool.function.name in probe for tool in self._body.tools or ())

    def _known(self, form: ToolFormat, messages: Sequence[Message]) -> str:
        """As a template wants it that knows tools in this form."""
        if "tool_calls" not in self._template.source:
            messages = with_calls_told(messages, form)
        elif not form.between:
            messages = with_single_calls(messages)
        messages = with_ids_of(messages, form)
        if form.in_system and self._tools:
            return self._render(with_tools_in_system(messages, self._tools), None)
        return self._render(messages, self._tools)

    def _told(self) -> str:
        """In words, for a template that knows no tools."""
        return self._render(with_tools_told(self._messages, self._tools), None)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None
    ) -> str:
        begin = self._body.add_generation_prompt is not False
        more = self._body.chat_template_kwargs
        text = self._template.render(messages, begin, tools or None, more)
        check_length(text, self._service)
        return text


def _plain(message: ChatMessage, i: int) -> dict[str, object]:
    """A message as templates know it: its content is one string, arguments are objects."""
    where = f"messages[{i}]"
    for name in _UNSUPPORTED_IN_MESSAGES:
        if (message.model_extra or {}).get(name):
            field = f"{where}.{name}"
            raise RequestError(f"{field} is not supported by this server; leave it out", field)
    plain: dict[str, object] = {"role": message.role}
    if isinstance(message.content, str):
        plain["content"] = message.content
    elif message.content is not None:
        plain["content"] = _parts_text(message.content, f"{where}.content")
    elif message.role == "assistant":
        plain["content"] = ""
    else:
        raise RequestError(f"{where}.content must not be null", f"{where}.content")
    if message.tool_calls and message.role == "assistant":
        plain["tool_calls"] = [
            _plain_call(call, f"{where}.tool_calls[{k}]")
            for k, call in enumerate(message.tool_calls)
        ]
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    return plain | {name: value for name, value in optional.items() if value is not None}


def _plain_call(call: ToolCall, where: str) -> dict[str, object]:
    field = f"{where}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise RequestError(f"{field} is no JSON text", field) from None
    if not isinstance(arguments, dict):
        raise RequestError(f"{field} is no JSON object", field)
    function = {"name": call.function.name, "arguments": arguments}
    called: dict[str, object] = {"type": "function", "function": function}
    return called if call.id is None else {"id": call.id, **called}


def _parts_text(parts: Sequence[TextPart], where: str) -> str:
    for i, part in enumerate(parts):
        if part.type != "text":
            message = f"{where}[{i}]: content of type {part.type!r:.60} is not supported, only text"
            raise RequestError(message, f"{where}[{i}].type")
        if part.text is None:
            raise RequestError(f"{where}[{i}].text is missing", f"{where}[{i}].text")
    return "\n".join(part.text or "" for part in parts)
