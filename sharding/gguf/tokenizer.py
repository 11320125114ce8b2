"""Tokenizers built from GGUF metadata: text to token ids and back, as llama.cpp does it.

Two kinds, named by `tokenizer.ggml.model`: "gpt2" is byte-level BPE (text is cut by the regexes of
`tokenizer.ggml.pre`, then merged by rank); "llama" is SentencePiece BPE, here SPM (the whole text
is merged by the score of the merged piece; characters outside the vocabulary become byte tokens).
The merging itself is done by the `tokenizers` library. Not here: reading the file (`reader.py`) and
chat templates (only their source text passes through). A tokenizer never changes once built.

Equal to llama.cpp in all that the peer tests could find (also in that a byte without a token in a
byte-level vocabulary is left out of the ids: SmolLM2 lacks 21, all but unused in UTF-8), except:
- Where two SPM pieces of exactly the same score compete for a character, the lower id wins, not the
  left one. Trained vocabularies have distinct scores.
- An SPM piece with a character that is no token itself is never made; trained ones have none.
- Where two control or user-defined tokens overlap in a text, the left one wins (of those that
  start together the longest), not the longest of all. `<|a|>`-like tokens cannot overlap.
- Gemma's `</s>` is what its file says, a user-defined HTML tag; llama.cpp calls it a control token.

Format: the GGUF specification's `[tokenizer]` section.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from sharding.errors import CorruptFileError, RequestError, UnsupportedModelError
from sharding.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, regex_of

Metadata = Mapping[str, Any]

# Values of tokenizer.ggml.token_type that make a token more than a piece of text.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"  # SentencePiece writes a space as this character

# Far beyond any real vocabulary; what cutting every piece in two costs grows with the square.
_MOST_PIECE_CHARS = 512

# Tokens that end an answer in the files of several families, whatever eos_token_id says.
# fmt: off
_END_NAMES = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>",
    "<|end|>",
)
# fmt: on


# The letter of each byte in a byte-level vocabulary (GPT-2's encoder): printable Latin-1 stands for
# itself, U+0100 and on for the other bytes in turn.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTERS = {chr(byte): bytes((byte,)) for byte in _PRINTABLE}
_LETTERS |= {chr(256 + index): bytes((byte,)) for index, byte in enumerate(_OTHERS)}

_BYTE_NAMES = {f"<0x{byte:02X}>": bytes((byte,)) for byte in range(256)}  # SPM's byte tokens


class Tokenizer:
    """Token ids in `[0, vocab_size)` for text, and text for token ids. Safe to share by threads:
    encoding releases the interpreter lock and takes time linear in the text.

    `bos_id`, `eos_id`: the tokens that begin and end a text, if the file names them. `stop_ids`:
    the tokens that end an answer (end of text, turn or message), eos first. `add_bos`, `add_eos`:
    whether `encode` puts `bos_id` first and `eos_id` last when `add_special` is set. `most_bytes`:
    no token stands for more bytes of a text. `chat_template`: source of the file's Jinja template,
    untrusted code: render it in a sandbox only.
    """

    def __init__(self, metadata: Metadata, vocab: _Vocab, model: BPE) -> None:
        self._vocab = vocab
        self._parsing = _engine(vocab, model, (_UNKNOWN, _CONTROL, _USER_DEFINED))
        self._literal = _engine(vocab, model, (_USER_DEFINED,))
        self.vocab_size: Final = len(vocab.tokens)
        self.bos_id: Final = _token_id(metadata, "bos", self.vocab_size)
        self.eos_id: Final = _token_id(metadata, "eos", self.vocab_size)
        self.stop_ids: Final = _stop_ids(metadata, vocab.ids)
        self.add_bos: Final = bool(vocab.begin)
        self.add_eos: Final = bool(vocab.end)
        self.most_bytes: Final = max(len(token.encode()) for token in vocab.tokens)
        self.chat_template: Final = _optional_text(metadata, "tokenizer.chat_template")

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes (keys `tokenizer.ggml.*`).

        Raises `UnsupportedModelError` for a model or pre-tokenizer that is not known here, and
        `CorruptFileError` for missing, ill-typed or contradictory keys.
        """
        if _choice(metadata, "tokenizer.ggml.model", None, ("gpt2", "llama")) == "llama":
            vocab = _read_vocab(metadata, None)
            return cls(metadata, vocab, _spm_model(metadata, vocab))
        pre = _choice(metadata, "tokenizer.ggml.pre", "default", PRE_TOKENIZERS)
        vocab = _read_vocab(metadata, PRE_TOKENIZERS[pre])
        return cls(metadata, vocab, _bpe_model(metadata, vocab))

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it (byte letters, U+2581 for a space)."""
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is not in [0, {self.vocab_size})")
        return self._vocab.tokens[token_id]

    def token_bytes(self, token_id: int, *, special: bool = True) -> bytes:
        """What the token adds to a text; may be a part of a UTF-8 character. Empty for control and
        unknown tokens when `special` is False."""
        text, kind = self.token_text(token_id), self._vocab.kinds[token_id]
        if kind in (_UNKNOWN, _CONTROL):
            return text.encode() if special else b""
        if kind == _USER_DEFINED:
            return text.encode()
        if self._vocab.pre is None:
            return _BYTE_NAMES.get(text) or text.replace(_SPACE, " ").encode()
        return b"".join(_LETTERS.get(letter) or letter.encode() for letter in text)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        `add_special`: add the begin and end tokens that the file asks for. `parse_special`: take
        control tokens spelled out in the text for the tokens themselves; False for text from
        untrusted hands (user-defined tokens are found either way). Raises `RequestError` for text
        with lone surrogates, which no UTF-8 can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is the lone surrogate "
                f"U+{ord(text[error.start]):04X}; send valid Unicode"
            ) from None
        engine = self._parsing if parse_special else self._literal
        # Unlike `encode`, the batch call releases the interpreter lock and skips offsets.
        ids: list[int] = engine.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [*self._vocab.begin, *ids, *self._vocab.end] if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises `RequestError` for an
        id outside the vocabulary."""
        decoder = self.incremental(skip_special=skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()

    def incremental(
        self,
        *,
        skip_special: bool = True,
        continues: bool = False,
        shown: Collection[int] = (),
    ) -> IncrementalDecoder:
        """A decoder for tokens that arrive one by one; an answer `continues` its prompt's text.
        `shown`: special tokens that are not skipped."""
        shown = range(self.vocab_size) if not skip_special else shown
        return IncrementalDecoder(self, self._vocab, shown, not continues)


class IncrementalDecoder:
    """Text as its tokens arrive. A UTF-8 character is never split; what was pushed, joined with
    `finish()`, equals `Tokenizer.decode` of all the ids. State: up to 3 bytes."""

    def __init__(
        self, tokenizer: Tokenizer, vocab: _Vocab, shown: Collection[int], start: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._kinds = vocab.kinds
        self._shown = shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = start and vocab.add_space_prefix

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty. Invalid bytes become U+FFFD as soon
        as they are known to be invalid. Raises `RequestError` for an id outside the vocabulary."""
        piece = self._tokenizer.token_bytes(token_id, special=token_id in self._shown)
        if self._at_start and self._kinds[token_id] not in (_UNKNOWN, _CONTROL):
            self._at_start = False
            if self._kinds[token_id] == _NORMAL:  # the space that `encode` put before the text
                piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """U+FFFD if the text ends inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class _Vocab:
    """What a file says about its tokens. `kinds[i]` is the token type; `pre` is None for SPM.
    `begin`, `end`: what goes around every text."""

    tokens: list[str]
    ids: dict[str, int]
    kinds: list[int]
    pre: PreTokenizer | None
    add_space_prefix: bool
    begin: tuple[int, ...]
    end: tuple[int, ...]


def _read_vocab(metadata: Metadata, pre: PreTokenizer | None) -> _Vocab:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    ids = _distinct(tokens)
    kinds = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        kinds = _numbers(metadata, "tokenizer.ggml.token_type", "iu", len(tokens)).tolist()
    for name in _END_NAMES:  # some converters forget to mark these
        if name in ids:
            kinds[ids[name]] = _CONTROL
    return _Vocab(
        tokens=tokens,
        ids=ids,
        kinds=kinds,
        pre=pre,
        add_space_prefix=_flag(metadata, "tokenizer.ggml.add_space_prefix", True) and pre is None,
        begin=_around(metadata, "bos", len(tokens), default=pre is None or pre.add_bos),
        end=_around(metadata, "eos", len(tokens), default=False),
    )


def _around(metadata: Metadata, name: str, count: int, default: bool) -> tuple[int, ...]:
    """The token that goes before or after every text, if the file has and wants it."""
    key = f"tokenizer.ggml.add_{name}_token"
    token_id = _token_id(metadata, name, count)
    if token_id is not None:
        return (token_id,) if _flag(metadata, key, default) else ()
    if _flag(metadata, key, False):
        raise CorruptFileError(f"{key} is set, but tokenizer.ggml.{name}_token_id is missing")
    return ()


def _stop_ids(metadata: Metadata, ids: Mapping[str, int]) -> tuple[int, ...]:
    keyed = (_token_id(metadata, name, len(ids)) for name in ("eos", "eot", "eom"))
    named = (ids.get(name) for name in _END_NAMES)
    found = (token_id for token_id in (*keyed, *named) if token_id is not None)
    return tuple(dict.fromkeys(found))


def _engine(vocab: _Vocab, model: BPE, kinds: tuple[int, ...]) -> Engine:
    """The library's tokenizer over `model` (shared, not copied), which finds tokens of these
    `kinds` in the raw text before anything else looks at it."""
    engine = Engine(model)
    if vocab.pre is None:
        escape = normalizers.Replace(" ", _SPACE)
        prefix = [normalizers.Prepend(_SPACE)] if vocab.add_space_prefix else []
        engine.normalizer = normalizers.Sequence([*prefix, escape])
    else:
        cuts = [
            pre_tokenizers.Split(regex_of(pattern), "isolated") for pattern in vocab.pre.regexes
        ]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    found = (t for t, kind in zip(vocab.tokens, vocab.kinds, strict=True) if kind in kinds)
    engine.add_tokens([AddedToken(token, normalized=False) for token in found])
    return engine


def _bpe_model(metadata: Metadata, vocab: _Vocab) -> BPE:
    """Merges in the order of the file: "left right", the earlier the sooner."""
    lines = _strings(metadata, "tokenizer.ggml.merges")
    merges = []
    for index, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not (left in vocab.ids and right in vocab.ids and left + right in vocab.ids):
            raise CorruptFileError(
                f"merge {index} of {len(lines)}, {line!r:.60}, is not two tokens that make a third"
            )
        merges.append((left, right))
    if repeated := len(merges) - len(set(merges)):
        raise CorruptFileError(f"{repeated} of {len(merges)} merges are duplicates")
    return BPE(vocab.ids, merges, ignore_merges=vocab.pre is not None and vocab.pre.whole_words)


def _spm_model(metadata: Metadata, vocab: _Vocab) -> BPE:
    """Merges from scores: two neighbours merge if their text is a token, the highest score first,
    so every way to cut a token in two becomes a merge with the rank of the token's score.

    Any token can be made this way, whatever its kind, as in llama.cpp.
    """
    tokens, ids = vocab.tokens, vocab.ids
    scores = _numbers(metadata, "tokenizer.ggml.scores", "f", len(tokens))
    for bad in np.flatnonzero(~np.isfinite(scores)):
        raise CorruptFileError(f"the score of token {bad} is {scores[bad]}, not a finite number")
    merges = []
    for token_id in np.argsort(-scores, kind="stable").tolist():
        token = tokens[token_id]
        if len(token) > _MOST_PIECE_CHARS:
            what = f"token {token_id} has {len(token)} characters"
            raise CorruptFileError(f"{what}; at most {_MOST_PIECE_CHARS} are expected")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((left, right))
    unknown_id = _token_id(metadata, "unknown", len(tokens))
    unknown = None if unknown_id is None else tokens[unknown_id]
    return BPE(ids, merges, unk_token=unknown, byte_fallback=True)


def _choice(metadata: Metadata, key: str, default: str | None, known: Iterable[str]) -> str:
    value = metadata.get(key, default)
    if not isinstance(value, str):
        raise CorruptFileError(f"metadata key {key} is missing or no string")
    if value not in known:
        raise UnsupportedModelError(
            f"{key} {value!r:.60} is not supported; supported: {', '.join(sorted(known))}"
        )
    return value


def _distinct(tokens: list[str]) -> dict[str, int]:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    for token_id, token in enumerate(tokens):
        if ids[token] != token_id:
            raise CorruptFileError(f"tokens {token_id} and {ids[token]} are both {token!r:.60}")
    return ids


def _optional_text(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise CorruptFileError(f"metadata key {key} is {value!r:.60}, not a string")
    return value


def _strings(metadata: Metadata, key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list):
        raise CorruptFileError(f"metadata key {key} is missing or no array of strings")
    if not values:
        raise CorruptFileError(f"{key} is empty")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise CorruptFileError(f"{key}[{index}] is {value!r:.60}, not a string")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise CorruptFileError(f"{key} holds text that is not valid Unicode: {error}") from None
    return values


def _numbers(metadata: Metadata, key: str, dtype_kinds: str, count: int) -> NDArray[Any]:
    """`count` numbers of a numpy kind ("iu" whole, "f" real)."""
    values = metadata.get(key)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in dtype_kinds:
        raise CorruptFileError(f"metadata key {key} is missing or no array of the right numbers")
    if values.shape != (count,):
        raise CorruptFileError(f"{key} has {values.size} entries for {count} tokens")
    return values


def _token_id(metadata: Metadata, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise CorruptFileError(f"{key} is {value!r:.60}, not a whole number")
    if not 0 <= value < count:
        raise CorruptFileError(f"{key} is {value}, outside the vocabulary [0, {count})")
    return value


def _flag(metadata: Metadata, key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise CorruptFileError(f"{key} is {value!r:.60}, not a boolean")
    return value
