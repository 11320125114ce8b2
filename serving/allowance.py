"""What one rendering of an untrusted template may use, and the doors that charge it.

Two invariants bound a template that nobody has read. No value is larger than `value_bytes` when
written out in full (`[x, x]` counts x twice), so that no single operation on it takes long. And
every new value is charged to `memory_bytes`, so that their sum is bounded as well. The allowance of
the rendering under way is a context variable: the functions of `filters.py` and the environment of
`sandbox.py` charge it without passing it on. Not here: which operations a template has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jinja2 import TemplateError, Undefined

_LEAVES = (str, int, float, type(None), Undefined)
_CONTAINERS = (list, tuple, dict)
STEP_BYTES = 64  # charged for a turn of a loop or a call, about what its bookkeeping takes


class LimitError(TemplateError):
    """A template wants more memory or time than a chat template can need, or no plain data."""


class Allowance:
    """`value_bytes`: the largest value; `memory_bytes`: all values together, freed ones included;
    `cpu_s`: seconds of this thread's own computing, so that a busy machine fails nobody."""

    def __init__(self, value_bytes: int, memory_bytes: int, cpu_s: float) -> None:
        self.value_bytes = value_bytes
        self._memory_left = memory_bytes
        self._deadline = time.thread_time() + cpu_s

    def spend(self, n_bytes: int = 0) -> None:
        """Charge memory and look at the clock; raises `LimitError`."""
        self._memory_left -= n_bytes
        if self._memory_left < 0:
            raise LimitError("it makes more text than a chat template may")
        if time.thread_time() > self._deadline:
            raise LimitError("it runs longer than a chat template may")

    def fits(self, n_bytes: int) -> None:
        """Refuse a value of `n_bytes`, before it exists where possible; raises `LimitError`."""
        if n_bytes > self.value_bytes:
            raise LimitError(f"it makes a value of more than {self.value_bytes} bytes")

    def weigh(self, value: object) -> None:
        """Refuse a container that is too large when written out in full or holds more than plain
        data; raises `LimitError`."""
        total, todo = 0, [value]
        while todo:
            item = todo.pop()
            if isinstance(item, dict):
                todo += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                todo += item
            elif not isinstance(item, _LEAVES):
                raise LimitError(f"it uses a {type(item).__name__} as plain data")
            total += sys.getsizeof(item)
            self.fits(total)
            self.spend()


_current: ContextVar[Allowance] = ContextVar("allowance")


@contextmanager
def rendering(allowance: Allowance) -> Iterator[None]:
    """Everything that a template does inside is charged to `allowance`."""
    token = _current.set(allowance)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Allowance:
    """The allowance of the rendering under way."""
    return _current.get()


def made(value: object) -> object:
    """The door for new values: charge `value` and pass it on."""
    allowance = _current.get()
    size = sys.getsizeof(value)
    allowance.fits(size)
    allowance.spend(size)
    if isinstance(value, _CONTAINERS):
        allowance.weigh(value)
    return value


def written(value: object) -> str:
    """What `{{ value }}` prints: plain data only, so that no address of a Python object shows."""
    if not isinstance(value, str):
        _current.get().weigh(value)
    return str(value)


def each(items: object) -> Iterator[object]:
    """The items of a loop, a step charged for each turn."""
    if not isinstance(items, Iterable):
        raise TypeError(f"a {type(items).__name__} cannot be looped over")
    allowance = _current.get()
    for item in items:
        allowance.spend(STEP_BYTES)
        yield item


def joined(items: object, separator: object = "") -> str:
    """`items` as one text, refused before it exists if it would be too large."""
    between, texts, size = written(separator), list[str](), 0
    for item in each(items):
        texts.append(written(item))
        size += sys.getsizeof(texts[-1]) + sys.getsizeof(between)
        _current.get().fits(size)
    return between.join(texts)


def plain_arguments(args: Iterable[object]) -> None:
    """Weigh arguments together: a macro that takes `varargs` makes a container of them."""
    _current.get().weigh([arg for arg in args if isinstance(arg, (*_LEAVES, *_CONTAINERS))])
