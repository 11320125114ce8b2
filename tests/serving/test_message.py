"""An assistant's words come apart the same way, however they are cut into pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.message import AnswerForm, MessageReader, Thinking
from serving.tool_formats import TOLD, ToolFormat, format_of

HERMES = TOLD
CALL = '{"name": "find", "arguments": {"text": "a \\"}{\\" b", "in": [1, {"x": null}]}}'
ARGUMENTS = {"text": 'a "}{" b', "in": [1, {"x": None}]}
CALLED = ("find", ARGUMENTS)


def known(*words: str) -> ToolFormat:
    """The form of a template with these words."""
    form = format_of("{% if tools %}" + " ".join(words))
    assert form is not None
    return form


MISTRAL = known("[TOOL_CALLS]")
MISTRAL_ARGS = known("[TOOL_CALLS]", "[ARGS]")
PHI = known("<|tool|>")
LLAMA = known('{"name": function name, "parameters": dictionary}')


@dataclass
class Message:
    """What was read."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    called: bool = False


def read(form: AnswerForm, *pieces: str) -> Message:
    """The whole message in these pieces."""
    reader, message = MessageReader(form), Message()
    for number, piece in enumerate(pieces, 1):
        for part in reader.read(piece, number == len(pieces)):
            message.content += part.content
            message.reasoning += part.reasoning
            if part.call is None:
                continue
            if part.call.name is not None:
                message.calls.append((part.call.name, ""))
                message.ids.append(str(part.call.id))
            assert part.call.index == len(message.calls) - 1
            name, arguments = message.calls[-1]
            message.calls[-1] = name, arguments + part.call.arguments
    message.called = reader.called
    return message


def said(message: Message) -> tuple[str, str, list[tuple[str, object]]]:
    return (
        message.content,
        message.reasoning,
        [(name, json.loads(arguments)) for name, arguments in message.calls],
    )


CASES: list[tuple[Thinking, ToolFormat | None, str, str, str, list[tuple[str, object]]]] = [
    ("none", None, "  as it is \n", "  as it is \n", "", []),
    ("none", None, f"<tool_call>{CALL}", f"<tool_call>{CALL}", "", []),
    ("none", None, "<think>no</think>", "<think>no</think>", "", []),
    ("maybe", None, "<think>\nhm\n</think>\n\nSo.", "So.", "hm", []),
    ("maybe", None, "So <think>.", "So <think>.", "", []),
    ("maybe", None, "<thing>", "<thing>", "", []),
    ("maybe", None, "<thin", "<thin", "", []),
    ("open", None, "\nhm </ \n</think>So.", "So.", "hm </", []),
    ("open", None, "no end ", "", "no end ", []),
    ("none", HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", "", [CALLED]),
    ("none", HERMES, f"Wait.\n\n<tool_call>\n{CALL}\n</tool_call>", "Wait.", "", [CALLED]),
    (
        "open",
        HERMES,
        f"a <tool_call>\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>\n"
        f"<tool_call>\n{CALL}\n</tool_call>\n",
        "",
        "a <tool_call>",
        [CALLED, CALLED],
    ),
    ("none", HERMES, "1 < 2 <tool", "1 < 2 <tool", "", []),
    ("none", HERMES, "text \n", "text \n", "", []),
    ("none", MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", [CALLED, CALLED]),
    ("none", MISTRAL, f"Well [TOOL_CALLS][{CALL}]", "Well", "", [CALLED]),
    (
        "none",
        MISTRAL_ARGS,
        '[TOOL_CALLS]find[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}',
        "",
        "",
        [("find", {"a": 1}), ("now", {})],
    ),
    ("none", PHI, f"<|tool_call|>[{CALL}]<|/tool_call|>", "", "", [CALLED]),
    ("none", LLAMA, '{"name": "now", "parameters": {"a": {}}}', "", "", [("now", {"a": {}})]),
    ("none", LLAMA, 'It is {"name": 1}', 'It is {"name": 1}', "", []),
]


@pytest.mark.parametrize(("thinking", "tools", "text", "content", "reasoning", "calls"), CASES)
def test_a_message_comes_apart(
    thinking: Thinking,
    tools: ToolFormat | None,
    text: str,
    content: str,
    reasoning: str,
    calls: list[tuple[str, object]],
) -> None:
    message = read(AnswerForm(thinking, tools), text)
    assert said(message) == (content, reasoning, calls)
    assert message.called == bool(calls)
    assert len(set(message.ids)) == len(calls)


@given(
    case=st.sampled_from(CASES),
    cuts=st.lists(st.integers(0, 160), max_size=30),
    every=st.sampled_from([1, 2, 1000]),
)
def test_no_cut_into_pieces_shows(
    case: tuple[Thinking, ToolFormat | None, str, str, str, list[tuple[str, object]]],
    cuts: list[int],
    every: int,
) -> None:
    thinking, tools, text, *expected = case
    borders = sorted(
        {0, len(text), *(c for c in cuts if c < len(text)), *range(0, len(text), every)}
    )
    pieces = [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    assert list(said(read(AnswerForm(thinking, tools), *pieces, ""))) == expected


def test_what_is_read_is_told_at_once() -> None:
    """A reader waits for nothing but what could be something else."""
    reader = MessageReader(AnswerForm("maybe", HERMES))
    told = [
        [(part.content, part.reasoning, part.call and part.call.arguments) for part in parts]
        for parts in map(
            reader.read, ("<think>a", "b </", "x</think>", "c <", "d", '<tool_call>\n{"na')
        )
    ]
    assert told == [
        [("", "a", None)],
        [("", "b", None)],
        [("", " </x", None)],
        [("c", "", None)],
        [(" <d", "", None)],
        [],
    ]
    (named,) = reader.read('me": "f", "arguments": ')
    assert named.call is not None and (named.call.name, named.call.arguments) == ("f", "")
    (more,) = reader.read('{"a": ')
    assert more.call is not None and (more.call.name, more.call.arguments) == (None, '{"a": ')


@pytest.mark.parametrize("stop", range(1, 60, 7))
def test_a_call_that_is_cut_off_is_not_complete(stop: int) -> None:
    message = read(AnswerForm("none", HERMES), f"<tool_call>\n{CALL}"[:stop])
    assert not message.called
    assert "".join(arguments for _, arguments in message.calls) in json.dumps(ARGUMENTS)


def test_ids_are_as_long_as_a_template_takes_them() -> None:
    (short,) = read(AnswerForm("none", MISTRAL), f"[TOOL_CALLS][{CALL}]").ids
    assert len(short) == 9 and short.isalnum()
    (long,) = read(AnswerForm("none", PHI), f"<|tool_call|>[{CALL}]").ids
    assert long.startswith("call_") and len(long) > 20
