"""Takes an assistant's words apart: thinking, content, and calls of tools, as they come.

The calls' form is that of the model's template; a grammar keeps the model to it, so what is read
here is well-formed as far as it goes. Not here: the grammar (`grammars.py`), tokens and stop
strings (`text.py`), the wire format (`chat.py`).
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from serving.tool_formats import ToolFormat

Thinking = Literal["none", "maybe", "open"]

THINK, THOUGHT = "<think>", "</think>"

_ID_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may hold besides content. `thinking`: "maybe" if the model may begin with it,
    "open" if its prompt began it. `tools`: how it calls them, None: it cannot. `alone`: it is
    content or calls, not both."""

    thinking: Thinking = "none"
    tools: ToolFormat | None = None
    alone: bool = False


@dataclass(frozen=True)
class CallPart:
    """What became known of call number `index`: first its id and name, then arguments (JSON)."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class MessagePart:
    """What became known of a message, of one kind at a time."""

    content: str = ""
    reasoning: str = ""
    call: CallPart | None = None


class MessageReader:
    """One answer, fed with its text piece by piece. `called`: whether a call is complete."""

    def __init__(self, form: AnswerForm) -> None:
        self.called = False
        self._tools, self._alone = form.tools, form.alone
        self._left = ""
        self._last = False
        self._parts: list[MessagePart] = []
        self._calls = 0
        self._arguments_end = _ObjectEnd()
        states = {"none": self._first_content, "maybe": self._perhaps_thinking}
        self._state: Callable[[], bool] = states.get(form.thinking, self._before_thought)

    def read(self, text: str, last: bool = False) -> list[MessagePart]:
        """What `text` adds; `last`: nothing follows, and nothing is held back any more."""
        self._left += text
        self._last = last
        self._parts = []
        while self._left and self._state():
            pass
        return self._parts

    # Each state takes what it can from the text that is left, and says whether another is to go on.

    def _perhaps_thinking(self) -> bool:
        begun = self._left.lstrip()
        if begun.startswith(THINK):
            self._left = begun.removeprefix(THINK)
            self._state = self._before_thought
        elif THINK.startswith(begun) and not self._last:
            return False
        else:
            self._state = self._first_content
        return True

    def _before_thought(self) -> bool:
        self._left = self._left.lstrip()
        self._state = self._thought if self._left else self._state
        return bool(self._left)

    def _thought(self) -> bool:
        text, found = self._up_to(THOUGHT)
        if text:
            self._parts.append(MessagePart(reasoning=text))
        if found:
            self._state = self._after_thought
        return found

    def _after_thought(self) -> bool:
        self._left = self._left.lstrip()
        self._state = self._first_content if self._left else self._state
        return bool(self._left)

    def _first_content(self) -> bool:
        if self._tools is None:
            self._state = self._rest
            return True
        marker, begun = self._tools.marker, self._left.lstrip()
        if marker and not self._alone:
            self._state = self._content
        elif begun.startswith(marker or "{"):
            self._left = begun.removeprefix(marker)
            self._state = self._opening
        elif marker.startswith(begun) and not self._last:
            return False
        else:
            self._state = self._rest
        return True

    def _rest(self) -> bool:
        self._parts.append(MessagePart(content=self._left))
        self._left = ""
        return False

    def _content(self) -> bool:
        assert self._tools is not None, "else all is content"
        text, found = self._up_to(self._tools.marker)
        if text:
            self._parts.append(MessagePart(content=text))
        if found:
            self._state = self._opening
        return found

    def _opening(self) -> bool:
        assert self._tools is not None, "calls have a form"
        return self._expect(self._tools.opening.strip() + self._tools.head, self._name)

    def _name(self) -> bool:
        assert self._tools is not None, "calls have a form"
        name, middle, rest = self._left.partition(self._tools.middle)
        if not middle:
            return False
        letters = (secrets.choice(_ID_LETTERS) for _ in range(self._tools.id_chars))
        # Nine letters and digits is all that some templates take.
        prefix = "call_" if self._tools.id_chars > 9 else ""
        part = CallPart(self._calls, prefix + "".join(letters), name)
        self._parts.append(MessagePart(call=part))
        self._left, self._state, self._arguments_end = rest, self._arguments, _ObjectEnd()
        return True

    def _arguments(self) -> bool:
        stop = self._arguments_end.find(self._left)
        text, self._left = (
            self._left[:stop],
            self._left[len(self._left) if stop is None else stop :],
        )
        self._parts.append(MessagePart(call=CallPart(self._calls, arguments=text)))
        if stop is not None:
            self._calls += 1
            self.called = True
            self._state = self._behind_call
        return stop is not None

    def _behind_call(self) -> bool:
        assert self._tools is not None, "calls have a form"
        more = self._tools.tail + self._tools.between + self._tools.head
        if self._tools.between and self._left.startswith(more):
            self._left = self._left.removeprefix(more)
            self._state = self._name
            return True
        return False  # what closes the calls, or the beginning of another

    def _expect(self, text: str, then: Callable[[], bool]) -> bool:
        """Skip `text`, and space before it."""
        begun = self._left.lstrip()
        if begun.startswith(text):
            self._left, self._state = begun.removeprefix(text), then
            return True
        return False

    def _up_to(self, marker: str) -> tuple[str, bool]:
        """Take the text before a marker, and the marker if it is there. Space at the end, and what
        could begin a marker, wait for what follows."""
        text, found, rest = self._left.partition(marker)
        if found:
            self._left = rest
            return text.rstrip(), True
        held = 0 if self._last else _could_begin(text, marker)
        sure = text[: len(text) - held]
        sure = sure if self._last else sure.rstrip()
        self._left = text[len(sure) :]
        return sure, False


class _ObjectEnd:
    """Finds where a JSON object ends, in text that comes in any pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Where it ends in this piece, None if it goes on."""
        for i, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def _could_begin(text: str, marker: str) -> int:
    """How many characters at the end of `text` a marker could begin with."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
