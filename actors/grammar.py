"""Which tokens may come next, for a request whose answer must follow a grammar.

The only home of llguidance. A grammar is text in its Lark dialect (github.com/guidance-ai/
llguidance, docs/syntax.md), which holds JSON schemas (`%json`) and single tokens (`<[id]>`) too.
What may follow depends on the drawn tokens alone, so a replay draws what was drawn before. Not
here: what a client asks for (`serving/grammars.py` writes grammars), and the drawing.
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
_CALM = '\n%llguidance {"no_forcing": true}'

# Strings, regular expressions, and the names of terminals.
_PARTS = re.compile(r"""\"(?:\\.|[^"\\])*\"|/(?:\\.|[^/\\])*/|\b([A-Z][A-Z0-9_]*)\b""")
_MOST_TOKENS = 300_000
_Pair = tuple[llguidance.LLMatcher, llguidance.LLMatcher]

_KEPT = 64  # grammars that are not read again
_MOST_ERROR_CHARS = 400

LIMITS = llguidance.LLParserLimits(
    max_items_in_row=5_000, step_max_items=10_000, max_lexer_states=50_000, verbose_errors=False
)
"""What following a stranger's grammar may take: some tenths of a second a token, and 100 MB."""


class Constraint:
    """What a grammar leaves to draw after the tokens so far.

    `allowed`: bit `id % 8` of byte `id // 8` is set for those that may come next. `complete`:
    nothing more can. `error`: why the grammar cannot be followed any further.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        calm: llguidance.LLMatcher,
        ends: bytes,
        drawn: Sequence[int] = (),
    ) -> None:
        """`matcher` and `calm`, which does not look ahead, are at the beginning of the same
        grammar; `drawn` is what it goes on behind; `ends`: a mask of the tokens that end an answer.
        """
        self._matcher: llguidance.LLMatcher = matcher
        self._calm: llguidance.LLMatcher | None = calm
        self._ends = ends
        self._said: list[int] = []
        for token in drawn:
            self._go_on(token)
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
        forced = self._go_on(token)[: max(0, min(most, MOST_FORCED))]
        forced = forced[: self._matcher.try_consume_tokens(forced)]
        self._said += forced
        self._look()
        return forced

    def _go_on(self, token: int) -> list[int]:
        """Those that can only follow a token.

        A text without any choice is found anew at each step: one of 100,000 characters would take
        a third of a second each time, and others' requests wait for that. So from the first such
        text on nothing is looked for; where that is, the drawn tokens tell.
        """
        self._matcher.consume_token(token)
        self._said.append(token)
        if self._calm is None or self._matcher.is_stopped():
            return []
        forced = self._matcher.compute_ff_tokens()
        if len(forced) <= _MOST_AHEAD:
            return forced
        self._matcher, self._calm = self._calm, None
        self._matcher.consume_tokens(self._said)
        return []

    def _look(self) -> None:
        stopped = self._matcher.is_stopped()
        self.allowed = self._ends if stopped else self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.error = f"the answer's grammar failed: {brief(self._matcher.get_error())}"
        self.complete = self.error is None and self._matcher.is_stopped()


class Grammars:
    """Grammars over one vocabulary. Thread-safe."""

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        """`tokenizer` is asked when it is first needed, since that takes a second or two."""
        self._ask = tokenizer
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._ends = b""
        self._read: OrderedDict[str, _Pair] = OrderedDict()

    def prepare(self) -> None:
        """Do now what the first grammar would wait for."""
        with self._lock:
            if self._tokenizer is None:
                tokenizer = self._ask()
                self._tokenizer, self._ends = _adapted(tokenizer), _mask(tokenizer.stop_ids)

    def compile(self, grammar: str, drawn: Sequence[int] = ()) -> Constraint:
        """A grammar behind the tokens that were drawn already. Takes milliseconds, for the largest
        seconds, without the interpreter's lock; others wait meanwhile. A stranger's was vetted.
        Raises `RequestError` if it cannot be used."""
        self.prepare()
        with self._lock:
            pair = self._read.get(grammar)
            if pair is None:
                pair = self._read[grammar] = self._matcher(grammar), self._matcher(calmed(grammar))
            self._read.move_to_end(grammar)
            if len(self._read) > _KEPT:
                self._read.popitem(last=False)
            matcher, calm = (each.deep_copy() for each in pair)
        constraint = Constraint(matcher, calm, self._ends, drawn)
        if constraint.error is not None:
            raise RequestError(constraint.error)
        return constraint

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        check_size(grammar)
        assert self._tokenizer is not None, "prepared"
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {brief(matcher.get_error())}")
        return matcher


def check_size(grammar: str, most_bytes: int = MOST_GRAMMAR_BYTES) -> None:
    """Raises `RequestError` for a grammar that is too long."""
    if (size := len(grammar.encode(errors="surrogatepass"))) > most_bytes:
        raise RequestError(f"the grammar has {size} bytes, more than {most_bytes}; make it smaller")


def calmed(grammar: str) -> str:
    """The same grammar, of which no tokens are found that can only follow. Only so are strangers'
    grammars bounded: of `/x+/ /x+/` llguidance looks for the end of x for ever. The last word on
    this counts, so nothing may come behind it."""
    return grammar if grammar.startswith("{") else grammar + _CALM


def from_gbnf(grammar: str) -> str:
    """llama.cpp's notation in Lark's. Raises `ValueError` if it is none.

    The library makes terminals of rules without recursion, and a terminal takes all that it can:
    `[0-9]+ ws` would leave no line break to a rule behind it. Here all are rules.
    """
    try:
        lark = gbnf_to_lark(grammar)
    except Exception as error:  # of no narrower class: the library raises plain ones
        raise ValueError(brief(str(error))) from error
    return _PARTS.sub(lambda found: f"t_{found[1].lower()}" if found[1] else found[0], lark)


def _adapted(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    if not tokenizer.stop_ids:
        raise RequestError("this model's file names no token that ends an answer")
    wrapped = llguidance.TokenizerWrapper(_Adapter(tokenizer))
    return llguidance.LLTokenizer(wrapped, eos_token=list(tokenizer.stop_ids))


def byte_tokenizer() -> llguidance.LLTokenizer:
    """Of a vocabulary of bytes, with numbers for as many tokens as any model has: to read grammars
    without a model."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def _mask(tokens: Sequence[int]) -> bytes:
    bits = bytearray(max(tokens, default=0) // 8 + 1)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


class _Bytes:
    eos_token_id, bos_token_id = 256, None
    special_token_ids = range(256, _MOST_TOKENS)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"<%d>" % token for token in special_token_ids]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


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


def brief(error: str) -> str:
    """What is wrong, without the drawing of where: most grammars are written by us."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["for no reason told"]
    cause = next((line for line in lines[1:] if line.startswith("error: ")), "")
    said = re.sub(r"^at \d+\(\d+\): ", "", lines[0]) + cause.removeprefix("error")
    return said[:_MOST_ERROR_CHARS]
