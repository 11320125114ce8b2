"""Writes the grammar of an answer: what a client wants its content to be, calls of tools, and a
model's thinking before both.

In llguidance's Lark dialect, as `actors/grammar.py` reads it. Not here: which fields ask for what
(`wishes.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.grammar import calmed, check_size, from_gbnf
from serving.service import Tokenizer
from serving.tool_formats import ToolFormat

Schema = Mapping[str, object]

# A model may go to a new line and indent, but not for ever.
_SPACED = {"whitespace_pattern": r"[ ]?|\n{1,2}[ \t]{0,20}", "coerce_one_of": True}
# On one line: fewer tokens, and many of those that are left can only be what they are.
_ONE_LINE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}

_SAYS_NOTHING = ("$comment", "description", "examples", "title", "x-guidance")
_NAMED_SCHEMAS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_TELL_PROPERTIES = {"$ref", "additionalProperties", "allOf", "anyOf", "minProperties", "oneOf"}
_TELL_PROPERTIES |= {"patternProperties"}
_VALUES = ("const", "default", "enum")

_MOST_GBNF_BYTES = 16 << 10  # what they take to be read grows with the square
_MOST_CALLS = 16  # of one answer: a weak model would go on to the end of its context

_ANY = r"/(.|\n)*/"
_MARKER = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])")


@dataclass(frozen=True)
class Tool:
    """A function that may be called. `strict`: its schema is kept to or refused; else what of it
    cannot be kept to is left to the model."""

    name: str
    parameters: Schema | None = None
    strict: bool = False


@dataclass(frozen=True)
class Calls:
    """What may be called, and how. `needed`: an answer must call; `several`: it may call more than
    once."""

    tools: Sequence[Tool]
    format: ToolFormat
    needed: bool = False
    several: bool = True


@dataclass(frozen=True)
class Content:
    """What content shall be: the right side of a rule, or a client's `own` grammar."""

    text: str
    own: bool = False


def json_content(schema: Schema) -> Content:
    """Content that is JSON of a schema, on one line."""
    return Content(f"%json {_dumped({**_bare(schema), 'x-guidance': _ONE_LINE})}")


def json_text_content(text: str) -> Content:
    """The same for a schema as text. Raises `ValueError` if it is none."""
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("its schema is no JSON object")
    return json_content(schema)


def any_object_content() -> Content:
    """Content that is a JSON object, with space as the model likes it."""
    return Content(f"%json {_dumped({'type': 'object', 'x-guidance': _SPACED})}")


def regex_content(pattern: str) -> Content:
    """Content that a regular expression (of Rust's kind) matches as a whole."""
    whole = pattern.removeprefix("^")
    whole = whole if whole.endswith("\\$") else whole.removesuffix("$")
    return Content(f"/{_between_slashes(whole)}/")


def choice_content(choices: Sequence[str]) -> Content:
    """Content that is one of some texts."""
    return Content(" | ".join(map(_dumped, choices)))


def grammar_content(text: str) -> Content:
    """Content of a grammar with a rule `root` in llama.cpp's notation (GBNF), or `start` in Lark's.
    Raises `ValueError` for what is neither, `RequestError` for one that is too long."""
    if "::=" in text:
        check_size(text, _MOST_GBNF_BYTES)
        text = from_gbnf(text)
    check_size(text)
    if text.lstrip().startswith("{"):  # llguidance's own notation, which could not be calmed
        raise ValueError("it is neither GBNF nor Lark")
    return Content(text, own=True)


def content_grammar(content: Content) -> str:
    """Of an answer that is content alone."""
    return calmed(content.text) if content.own else f"start: {content.text}"


def answer_grammar(
    tokenizer: Tokenizer, content: Content | None, calls: Calls | None, thinking: str
) -> str:
    """The whole answer's; `content` None: free text. `thinking`: "none", "maybe" or "open" (it has
    begun). Empty if anything goes."""
    if content is None and calls is None:
        return ""
    rules = [f"ANY: {_ANY}", f"TEXT: {_text(tokenizer, calls, thinking)}"]
    if content is not None:
        rules.append("content: @content" if content.own else f"content: {content.text}")
    elif calls is not None and not calls.format.marker:
        rules.append(r"content: | /[ \n]*[^{ \n](.|\n)*/")
    else:
        rules.append("content: TEXT")
    answer = ["content"]
    if calls is not None:
        rules += _call_rules(tokenizer, calls, alone=calls.needed or content is not None)
        answer = ["calls"] if calls.needed else ["content", "calls"]
    rules += _thinking_rules(tokenizer, thinking)
    before = {"none": "", "maybe": "thinking? ", "open": "thought "}[thinking]
    text = "\n".join([f"start: {before}answer", f"answer: {' | '.join(answer)}", *rules])
    if content is None or not content.own:
        return text
    nested = [
        {"name": "answer", "lark_grammar": calmed(text)},
        {"name": "content", "lark_grammar": calmed(content.text)},
    ]
    return _dumped({"grammars": nested})


def _text(tokenizer: Tokenizer, calls: Calls | None, thinking: str) -> str:
    """Free text: not what begins as thinking does, nor with a marker in it that is spelled where a
    token would be the marker. Readers could not tell them apart."""
    kept_out = []
    if thinking == "maybe" and special_id(tokenizer, "<think>") is None:
        kept_out.append(r"/\n*<think>(.|\n)*/")
    marker = "" if calls is None else calls.format.marker
    if marker and special_id(tokenizer, marker) is not None:
        kept_out.append(_holding(marker))
    return " & ".join(["ANY", *(f"~{each}" for each in kept_out)])


def _holding(marker: str) -> str:
    """Any text with a marker in it."""
    return rf"/(.|\n)*{_between_slashes(re.escape(marker))}(.|\n)*/"


def _thinking_rules(tokenizer: Tokenizer, thinking: str) -> list[str]:
    if thinking == "none":
        return []
    rules = [
        "thought: thought_text BREAK?",
        r"BREAK: /\n{1,2}/",
        f"thinking: BREAK? {_literal(tokenizer, '<think>')} thought",
    ]
    token = special_id(tokenizer, "</think>")
    if token is None:
        return [*rules, 'thought_text[lazy]: ANY "</think>"']
    unspelled = f"THOUGHT: ANY & ~{_holding('</think>')}"
    return [*rules, unspelled, f"thought_text: THOUGHT <[{token}]>"]


def _call_rules(tokenizer: Tokenizer, calls: Calls, alone: bool) -> list[str]:
    """`alone`: no text comes before the calls."""
    form = calls.format
    first = "" if alone else "TEXT "
    lazy: list[str] = []
    if form.marker and special_id(tokenizer, form.marker) is None and not alone:
        first, lazy = "up_to_call ", [f"up_to_call[lazy]: TEXT {_dumped(form.marker)}"]
    elif form.marker:
        first += f"{_literal(tokenizer, form.marker)} "
    else:
        first = ""
    parts = [_literal(tokenizer, form.opening), "call"]
    if calls.several and form.between:
        parts.append(f"({_literal(tokenizer, form.between)} call){{0,{_MOST_CALLS - 1}}}")
    parts.append(_literal(tokenizer, form.closing))
    rules = [*lazy, f"calls: {first}{' '.join(filter(None, parts))}"]
    rules.append(f"call: {' | '.join(f'call_{i}' for i in range(len(calls.tools)))}")
    for i, tool in enumerate(calls.tools):
        around = (form.head + tool.name + form.middle, form.tail)
        before, after = (_literal(tokenizer, text) for text in around)
        rules.append(f"call_{i}: {before} %json {_dumped(_arguments(tool))} {after}".rstrip())
    return rules


def special_id(tokenizer: Tokenizer, marker: str) -> int | None:
    """The token that a marker is, if it is one that is no text."""
    ids = tokenizer.encode(marker, add_special=False)
    alone = len(ids) == 1 and not tokenizer.token_bytes(ids[0], special=False)
    return ids[0] if alone else None


def markers_of(form: ToolFormat) -> list[str]:
    """What in the form of calls may be a token of its own."""
    texts = (form.marker, form.opening, form.closing, form.between, form.middle)
    return [found for text in texts for found in _MARKER.findall(text)]


def _literal(tokenizer: Tokenizer, text: str) -> str:
    """A text in a rule: the tokens that are no text, and what is between them."""
    parts: list[str] = []
    for part in filter(None, _MARKER.split(text)):
        token = special_id(tokenizer, part) if _MARKER.fullmatch(part) else None
        parts.append(_dumped(part) if token is None else f"<[{token}]>")
    return " ".join(parts)


def _arguments(tool: Tool) -> Schema:
    schema = _bare(tool.parameters or {})
    if not schema.keys() & _TELL_PROPERTIES:
        # Functions take no arguments that they do not name.
        schema = {"properties": {}, "additionalProperties": False, **schema}
    extra = {**_ONE_LINE, "lenient": not tool.strict}
    return {"type": "object", **schema, "x-guidance": extra}


def arguments_grammar(tool: Tool) -> str:
    """Of a tool's arguments alone, to tell which tool is at fault."""
    return f"start: %json {_dumped(_arguments(tool))}"


def _bare(schema: Schema) -> dict[str, object]:
    """Without what says nothing about a value."""
    bare: dict[str, object] = {}
    for key, value in schema.items():
        if key in _SAYS_NOTHING or (value is None and key not in _VALUES):
            continue
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            bare[key] = {name: _any_bare(each) for name, each in value.items()}
        else:
            bare[key] = value if key in _VALUES else _any_bare(value)
    return bare


def _any_bare(value: object) -> object:
    if isinstance(value, dict):
        return _bare(value)
    return [_any_bare(each) for each in value] if isinstance(value, list) else value


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _between_slashes(pattern: str) -> str:
    """A pattern as a literal of Lark's: no bare slash, no bare line break."""
    bare = re.sub(r"(\\.)|/", lambda found: found.group(1) or r"\/", pattern, flags=re.DOTALL)
    return bare.replace("\n", r"\n")
