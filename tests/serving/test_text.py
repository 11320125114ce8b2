"""Tokens become text without split characters or leaked stop strings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.request import LENGTH, STOP, Event
from serving.text import AnswerText, Piece, StopMatcher, token_name
from sharding.batch import Choice, SamplingParams
from tests.serving.fakes import EOS, ByteTokenizer, choices

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def answer(*stops: str, min_tokens: int = 0) -> AnswerText:
    params = SamplingParams(stop_ids=(EOS,), min_tokens=min_tokens)
    return AnswerText(ByteTokenizer(), params, stops, skip=True)


def fed(text: AnswerText, drawn: str, finish_reason: str = LENGTH) -> list[Piece]:
    """Pieces for `drawn` byte by byte, until the answer ends."""
    events = [Event(tokens=[choice]) for choice in choices(drawn)]
    pieces = []
    for event in [*events, Event(finish_reason=finish_reason)]:
        pieces.append(text.take(event))
        if text.finish_reason is not None:
            break
    return pieces


@given(STOPS, st.lists(st.text("abc", max_size=5), max_size=8))
def test_a_stop_string_is_found_wherever_the_text_is_cut(stops: list[str], cuts: list[str]) -> None:
    """A search in each piece alone misses stop strings that lie across two."""
    matcher, before, found = StopMatcher(stops), 0, None
    for cut in cuts:
        where = matcher.feed(cut)
        if where is not None:
            found = before + where
            break
        before += len(cut)
    text = "".join(cuts)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    longest = [max(len(s) for s in stops if text[:end].endswith(s)) for end in ends]
    assert found == (ends[0] - longest[0] if ends else None)


@given(STOPS, st.text("abc", max_size=20))
def test_exactly_what_could_begin_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    """Less would leak a part of a stop string, more would delay what can be shown."""
    pieces, sent = fed(answer(*stops), text), ""
    for n, piece in enumerate(pieces[:-1], start=1):
        sent += piece.text
        starts = [stop[:k] for stop in stops for k in range(len(stop))]
        held = max(len(start) for start in starts if text[:n].endswith(start))
        assert sent == text[: n - held]


@given(STOPS, st.text("abcé", max_size=20))
def test_pieces_and_tokens_add_up_to_the_text_before_the_stop(stops: list[str], text: str) -> None:
    pieces = fed(answer(*stops), text)
    shown = "".join(piece.text for piece in pieces)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    raw = bytes(token.choice.token for piece in pieces for token in piece.tokens)
    assert raw == shown.encode()


def test_characters_are_never_split() -> None:
    """One emoji is four tokens here; three of them are not yet text."""
    pieces = fed(answer(), "a😀é")
    assert [piece.text for piece in pieces] == ["a", "", "", "", "😀", "", "é", ""]


def test_half_a_character_at_the_end_becomes_a_replacement_mark() -> None:
    text = answer()
    text.take(Event(tokens=choices("é")[:1]))
    assert text.take(Event(finish_reason=LENGTH)).text == "�"


def test_text_that_was_held_back_comes_when_the_answer_ends() -> None:
    pieces = fed(answer("stop"), "sto")
    assert "".join(piece.text for piece in pieces) == "sto"


def test_the_end_token_is_counted_but_not_shown() -> None:
    text = answer()
    piece = text.take(Event(tokens=[*choices("hi"), Choice(EOS)], finish_reason=STOP))
    assert (piece.text, piece.finish_reason, text.drawn) == ("hi", "stop", 3)
    assert len(piece.tokens) == 2


def test_tokens_behind_a_stop_string_are_neither_counted_nor_shown() -> None:
    """The engine draws on until it hears of the stop; how far must not change the usage."""
    text = answer("!")
    piece = text.take(Event(tokens=choices("hi! more"), finish_reason=LENGTH))
    assert (piece.text, piece.finish_reason, text.drawn) == ("hi", "stop", 3)


def test_stop_strings_count_only_beyond_min_tokens() -> None:
    pieces = fed(answer("a", min_tokens=3), "aaaba")
    assert "".join(piece.text for piece in pieces) == "aaab"


def test_tokens_know_their_place_in_the_text() -> None:
    piece = answer().take(Event(tokens=choices("aéb"), finish_reason=LENGTH))
    assert [token.start for token in piece.tokens] == [0, 1, 1, 2]


def test_parts_of_characters_have_distinct_names() -> None:
    """As replacement marks they would all be the same key of one object."""
    names = [token_name(ByteTokenizer(), byte) for byte in "é".encode()]
    assert names == ["bytes:\\xc3", "bytes:\\xa9"]
