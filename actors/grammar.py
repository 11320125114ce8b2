"""Which tokens may come next, for a request whose answer must follow a grammar.

The only home of llguidance. A grammar is text in its Lark dialect (github.com/guidance-ai/
llguidance, docs/syntax.md), which holds JSON schemas (`%json`) and single tokens (`<[id]>`) too.
What may follow depends on the drawn tokens alone, so a replay draws what was drawn before. Not
here: what a client asks for (`serving/formats.py` writes grammars), and the drawing.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from sharding.errors import RequestError
from sharding.gguf.tokenizer import Tokenizer

MOST_GRAMMAR_BYTES = 128 << 10
"""Of a grammar's text. One schema with thousands of properties takes seconds to read."""

MOST_FORCED = 32
"""Tokens that follow another without being drawn. The same for any chunk: it may change an answer
how its text is cut into tokens."""

_MOST_AHEAD = 1000  # tokens that can only follow, before looking for them costs too much
_CALM = '%llguidance {"no_forcing": true}\n'

_KEPT = 64  # grammars that are not read again
_MOST_ERROR_CHARS = 400

# What a grammar of a stranger may take: a tenth of a second a token and some 100 MB at worst.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=20_000, max_lexer_states=50_000, verbose_errors=False
)


class Constraint:
    """What a grammar leaves to draw after the tokens so far.

    `allowed`: bit `id % 8` of byte `id // 8` is set for those that may come next. `complete`:
    nothing more can. `error`: why the grammar cannot be followed any further.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        calm: Callable[[], llguidance.LLMatcher],
        drawn: Sequence[int] = (),
    ) -> None:
        """`matcher` is at its beginning, `drawn` is what it goes on behind; `calm` makes one of the
        same grammar that does not look ahead."""
        self._matcher, self._calm = matcher, calm
        self._said = list(drawn)
        self._matcher.consume_tokens(self._said)
        self.allowed = b""
        self.complete = False
        self.error: str | None = None
        self._look()

    def take(self, token: int, most: int) -> list[int]:
        """Go on behind a token, and behind those that can only follow it, which it returns: `most`
        at most, and no more than `MOST_FORCED`.

        Where the grammar leaves one text only, these are the tokens that the model's tokenizer
        makes of it. To draw them one by one would take a step each.
        """
        self._matcher.consume_token(token)
        self._said.append(token)
        forced: list[int] = []
        if not self._matcher.is_stopped():
            forced = self._matcher.compute_ff_tokens()
            if len(forced) > _MOST_AHEAD:
                self._look_no_further()
                forced = []
            forced = forced[: max(0, min(most, MOST_FORCED))]
            forced = forced[: self._matcher.try_consume_tokens(forced)]
            self._said += forced
        self._look()
        return forced

    def _look_no_further(self) -> None:
        """A text without any choice is found anew at each step: one of 100,000 characters would
        take a third of a second each time, and others' requests wait for that."""
        self._matcher = self._calm()
        self._matcher.consume_tokens(self._said)

    def _look(self) -> None:
        if not self._matcher.is_stopped():
            self.allowed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.error = f"the answer's grammar failed: {_brief(self._matcher.get_error())}"
        self.complete = self.error is None and self._matcher.is_stopped()


class Grammars:
    """Grammars over one vocabulary. Thread-safe."""

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        """`tokenizer` is asked when it is first needed, since that takes a second or two."""
        self._ask = tokenizer
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._read: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Do now what the first grammar would wait for."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _adapted(self._ask())

    def compile(self, grammar: str, drawn: Sequence[int] = ()) -> Constraint:
        """A grammar behind the tokens that were drawn already. Takes milliseconds, for the largest
        seconds, without the interpreter's lock. Raises `RequestError` if it cannot be used."""
        self.prepare()
        with self._lock:
            known = self._read.get(grammar)
        if known is None:
            known = self._matcher(grammar)
        with self._lock:
            self._read[grammar] = known
            self._read.move_to_end(grammar)
            if len(self._read) > _KEPT:
                self._read.popitem(last=False)
            matcher = known.deep_copy()
        constraint = Constraint(matcher, lambda: self._matcher(calmed(grammar)), drawn)
        if constraint.error is not None:
            raise RequestError(constraint.error)
        return constraint

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        check_grammar(grammar, read=False)
        assert self._tokenizer is not None, "prepared"
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {_brief(matcher.get_error())}")
        return matcher


def check_grammar(grammar: str, param: str | None = None, *, read: bool = True) -> None:
    """Raises `RequestError`, with the field that it came from, for a grammar that no vocabulary
    could use; unless `read`, only for one that is too long."""
    if (size := len(grammar.encode())) > MOST_GRAMMAR_BYTES:
        message = f"the grammar has {size} bytes, more than {MOST_GRAMMAR_BYTES}; make it smaller"
        raise RequestError(message, param)
    if read and (error := llguidance.LLMatcher.validate_grammar(grammar, limits=_LIMITS)):
        raise RequestError(f"the grammar cannot be used: {_brief(error)}", param)


def calmed(grammar: str) -> str:
    """The same grammar, of which no tokens are found that can only follow. Only so are strangers'
    grammars bounded: of `/x+/ /x+/` llguidance looks for the end of x for ever."""
    return grammar if grammar.startswith("{") else _CALM + grammar


def from_gbnf(grammar: str) -> str:
    """llama.cpp's notation in Lark's. Raises `ValueError` if it is none."""
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:
        raise ValueError(_brief(str(error))) from error


def _adapted(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    if not tokenizer.stop_ids:
        raise RequestError("this model's file names no token that ends an answer")
    wrapped = llguidance.TokenizerWrapper(_Adapter(tokenizer))
    return llguidance.LLTokenizer(wrapped, eos_token=list(tokenizer.stop_ids))


class _Adapter:
    """A tokenizer as llguidance asks for it: by the names of its attributes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = tokenizer.stop_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in ids]
        self.special_token_ids = [
            token for token in ids if not tokenizer.token_bytes(token, special=False)
        ]
        self._tokenizer = tokenizer
        # Before a text SentencePiece puts a space, but not behind a byte that no word contains.
        spaced = self._encode("a") != self._encode("\x02a")[len(self._encode("\x02")) :]
        self._before = "\x02" if spaced else ""

    def __call__(self, text: bytes) -> list[int]:
        ids, before = self._encode(self._before + text.decode()), self._encode(self._before)
        return ids[len(before) :]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


def _brief(error: str) -> str:
    """What is wrong, without the drawing of where: most grammars are written by us."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["for no reason told"]
    cause = next((line for line in lines[1:] if line.startswith("error: ")), "")
    said = re.sub(r"^at \d+\(\d+\): ", "", lines[0]) + cause.removeprefix("error")
    return said[:_MOST_ERROR_CHARS]
