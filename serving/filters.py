"""The filters, tests and methods that chat templates may use, as tables.

What is not named here does not exist for a template. The work and the result of every entry are
linear in its operands, or it asks the allowance before it starts; `sandbox.py` charges the results.
Left out on purpose: whatever pads, repeats or formats to a size that an argument gives (`center`,
`zfill`, `str.format`), and whatever renders HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import LoopContext
from jinja2.tests import TESTS as JINJA_TESTS
from markupsafe import escape

from serving.allowance import LimitError, current, each, joined, written

Function = Callable[..., object]

_WIDEST = 256  # the widest indentation, in characters
_CHAR_BYTES = 4  # the most that Python stores a character in
# One conversion of printf, plain enough that its result is hardly longer than its argument.
_CONVERSION = re.compile(r"%%|%[-+0 ]?\d{0,2}(?:\.\d{1,2})?[sdifr]")


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    found = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    current().fits((len(text) + found * max(0, len(new) - len(old))) * _CHAR_BYTES)
    return text.replace(old, new, found)


def _most_parts() -> int:
    """How many parts a text may be split into: a short string takes about 64 bytes."""
    return current().value_bytes // 64


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    most = _most_parts()
    parts = text.split(sep, most if maxsplit < 0 else min(maxsplit, most))
    return _not_cut(parts, most)


def _rsplit(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    most = _most_parts()
    parts = text.rsplit(sep, most if maxsplit < 0 else min(maxsplit, most))
    return _not_cut(parts, most)


def _not_cut(parts: list[str], most: int) -> list[str]:
    if len(parts) > most:
        raise LimitError(f"it splits a text into more than {most} parts")
    return parts


def _splitlines(text: str) -> list[str]:
    """Lines as a chat knows them; Python's rarer line ends (form feed, U+2028) stay as they are."""
    lines = _split(text.replace("\r\n", "\n"), "\n")
    return lines if lines[-1] else lines[:-1]


def _join_method(separator: str, items: object) -> str:
    return joined(items, separator)


def percent(text: str, values: tuple[object, ...]) -> str:
    """`text % values` with plain conversions only: a width such as `%1000000000d` is refused."""
    if "%" in _CONVERSION.sub("", text):
        raise LimitError("its % formatting is limited to %s, %d, %i, %f and %r below width 100")
    current().weigh(values)
    current().fits(len(text) * 100)
    return text % values


def _format(text: object, *values: object) -> str:
    return percent(written(text), values)


def _pad(width: object) -> str:
    pad = width if isinstance(width, str) else " " * min(_whole(width), _WIDEST + 1)
    if len(pad) > _WIDEST:
        raise LimitError(f"it indents by more than {_WIDEST} characters")
    return pad


def _whole(value: object) -> int:
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"a whole number is needed, not a {type(value).__name__}")


def _indent(text: object, width: object = 4, first: bool = False, blank: bool = False) -> str:
    pad = _pad(width)
    lines = _split(written(text), "\n")
    current().fits(sum(map(len, lines)) + len(lines) * len(pad) * _CHAR_BYTES)
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([pad + lines[0] if first else lines[0], *rest])


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: characters as they are, keys in their order."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else _pad(indent),
        separators=separators,
        sort_keys=sort_keys,
    )
    return joined(encoder.iterencode(value))


def _round(value: float, precision: int = 0, method: str = "common") -> object:
    if abs(_whole(precision)) > 20:
        raise LimitError("it rounds to more than 20 digits")
    return JINJA_FILTERS["round"](value, precision, method)


def _title(text: object) -> str:
    return written(text).title()


def _list(items: object) -> list[object]:
    return list(each(items))


def _join(items: object, separator: object = "") -> str:
    return joined(items, separator)


def _replace_filter(text: object, old: object, new: object, count: int | None = None) -> str:
    return _replace(written(text), written(old), written(new), count)


def _safe(value: object) -> object:
    """Nothing is escaped by itself in a chat template, so nothing needs to be kept from it."""
    return value


def _escape(value: object) -> str:
    return str(escape(written(value)))


def _remainder(value: object, divisor: object) -> int:
    return _whole(value) % _whole(divisor)  # never a string's %, which would format


def _odd(value: object) -> bool:
    return _remainder(value, 2) == 1


def _even(value: object) -> bool:
    return _remainder(value, 2) == 0


def _divisible_by(value: object, divisor: object) -> bool:
    return _remainder(value, divisor) == 0


def _named(table: Mapping[str, Any], names: str) -> dict[str, Function]:
    return {name: table[name] for name in names.split()}


LOOPING_FILTERS: dict[str, Function] = _named(
    JINJA_FILTERS, "map select reject selectattr rejectattr min max sort unique"
)
"""Filters that go through their first operand item by item, in Python."""

FILTERS: dict[str, Function] = {
    **_named(
        JINJA_FILTERS,
        "abs capitalize count d default dictsort first float int items last length lower reverse"
        " trim upper",
    ),
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace_filter,
    "round": _round,
    "safe": _safe,
    "string": written,
    "title": _title,
    "tojson": _tojson,
}

TESTS: dict[str, Function] = {
    **_named(JINJA_TESTS, " ".join(JINJA_TESTS)),
    "divisibleby": _divisible_by,
    "even": _even,
    "odd": _odd,
}

_STR_METHODS = (
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric"
    " isspace isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition"
    " rstrip startswith strip swapcase title upper"
)

METHODS: tuple[tuple[type, dict[str, Function]], ...] = (
    (
        str,
        {
            **_named(vars(str), _STR_METHODS),
            "join": _join_method,
            "replace": _replace,
            "rsplit": _rsplit,
            "split": _split,
            "splitlines": _splitlines,
        },
    ),
    (dict, _named(vars(dict), "copy get items keys values")),
    (list, _named(vars(list), "copy count index")),
    (tuple, _named(vars(tuple), "count index")),
    (LoopContext, _named(vars(LoopContext), "changed cycle")),
)
"""Methods by the type of their object, each taking the object first."""

LOOP_ATTRIBUTES = frozenset(
    {"depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem"}
    | {"revindex", "revindex0"}
)
