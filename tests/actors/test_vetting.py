"""Strangers' grammars are read in a process of their own, whatever they do to it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from actors.vetting import Vetting
from sharding.errors import RequestError
from tests.stages import wait_until


@pytest.fixture(scope="module")
def vetting() -> Iterator[Vetting]:
    with closing(Vetting()) as running:
        yield running


def test_a_grammar_that_can_be_used_is(vetting: Vetting) -> None:
    for grammar in ('start: "a" | /b+/', "start: <[151668]> /x/", "start: %json {}"):
        vetting.check(grammar)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("start: foo", 'unknown name: "foo"'),
        ("start: /(/", "regex parse error:: unclosed group"),
        ('\u0000\n"', "cannot be used"),
        ("start: " + "(" * 2000, "cannot be used"),
    ],
)
def test_what_is_wrong_is_told_each_time(vetting: Vetting, grammar: str, words: str) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match=r"\w") as caught:
            vetting.check(grammar)
        assert words in str(caught.value)


def chain(length: int) -> str:
    names = "\n".join(f"a{i}: a{i + 1}" for i in range(length))
    return f'start: a0\n{names}\na{length}: "x"'


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (chain(3000), "a deeper stack than there is"),
        (chain(1560), "a deeper stack than there is"),
        ('start: %json {"type": "integer", "multipleOf": 9999991}', "more than 2 s"),
        ("start: /x+/ /x+/", "more than 2 s"),
    ],
    ids=["too deep", "too deep for others", "too long", "endless"],
)
def test_what_the_reader_dies_of_is_refused_and_the_next_one_read(
    vetting: Vetting, grammar: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        vetting.check(grammar)
    vetting.check(chain(100))


def test_a_reader_that_was_killed_is_started_anew(vetting: Vetting) -> None:
    vetting.check("start: /before/")
    reader = vetting._reader
    assert reader is not None
    os.kill(reader.pid, signal.SIGKILL)
    wait_until(lambda: reader.poll() is not None)
    vetting.check("start: /after/")


def test_a_grammar_is_read_once(vetting: Vetting) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}}
    grammar = f"start: %json {json.dumps(schema)}"
    vetting.check(grammar)
    reader, vetting._reader = vetting._reader, None
    vetting.check(grammar)
    assert vetting._reader is None, "nobody had to be asked"
    vetting._reader = reader
