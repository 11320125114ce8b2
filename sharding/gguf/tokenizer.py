"""Tokenizers built from GGUF metadata: text to token ids and back, as llama.cpp does it.

Two kinds, named by `tokenizer.ggml.model`: "gpt2" is byte-level BPE (text is cut by the regexes of
`tokenizer.ggml.pre`, then merged by rank); "llama" is SentencePiece BPE, here SPM (the whole text
is merged by the score of the merged piece; characters outside the vocabulary become byte tokens).
The merging itself is done by the `tokenizers` library. Not here: reading the file (`reader.py`) and
chat templates (only their source text passes through). A tokenizer never changes once built.

Equal to llama.cpp on everything the peer tests could find, within two limits:
- Where two different SPM pieces of exactly the same score compete for the same characters, the
  lower id wins instead of the left one. Trained vocabularies have distinct scores.
- Where two control or user-defined tokens overlap in a text, the left one wins (of those that
  start together the longest) instead of the longest of all. `<|a|>`-like tokens cannot overlap.

As in llama.cpp a byte that has no token in a byte-level vocabulary is left out of the ids (SmolLM2
has no token for 21 bytes, such as 0xF9 or 0x00), so its characters do not survive a round trip.

Format: the GGUF specification's `[tokenizer]` section.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from sharding.errors import CorruptFileError, RequestError, UnsupportedModelError

Metadata = Mapping[str, Any]

# Values of tokenizer.ggml.token_type that make a token more than a piece of text.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"  # SentencePiece writes a space as this character

# Tokens that end an answer in the files of several families, whatever eos_token_id says.
_END_NAMES = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end|>",
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How a byte-level vocabulary cuts text before merging. Each regex cuts the pieces that the
    one before it left. `whole_words`: a piece that is a token is taken without merging."""

    regexes: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The contractions are spelled out: a case-insensitive group would also take U+017F for an s.
_LLAMA3 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Letters, digits and punctuation that came with Unicode 16: the regex library knows them, llama.cpp
# (Unicode 15) does not, and takes them for symbols.
_NEWER = (
    r"\x{1B4E}\x{1B4F}\x{1B7F}\x{1C89}\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}"
    r"\x{105C0}-\x{105F3}\x{10D40}-\x{10D85}\x{10EC2}-\x{10EC4}\x{11380}-\x{113D8}"
    r"\x{116D0}-\x{116E3}\x{11BC0}-\x{11BF9}\x{13460}-\x{143FA}\x{16100}-\x{16139}"
    r"\x{16D40}-\x{16D79}\x{18CFF}\x{1CCF0}-\x{1CCF9}\x{1E5D0}-\x{1E5FF}"
)

_PRE_TOKENIZERS = {
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PreTokenizer((_GPT2,)),
    "llama-bpe": _PreTokenizer((_LLAMA3 % r"\p{N}{1,3}",), whole_words=True, add_bos=True),
    "qwen2": _PreTokenizer((_LLAMA3 % r"\p{N}",)),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2)),
}
_PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3"), _PRE_TOKENIZERS["llama-bpe"])


def _byte_letters() -> dict[int, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's encoder), as a
    table from character to byte: printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()


class Tokenizer:
    """Token ids in `[0, vocab_size)` for text, and text for token ids. Safe to share by threads:
    encoding releases the interpreter lock and takes time linear in the text."""

    def __init__(self, vocab: _Vocab, model: BPE) -> None:
        self._vocab = vocab
        self._parsing = _engine(vocab, model, (_UNKNOWN, _CONTROL, _USER_DEFINED))
        self._literal = _engine(vocab, model, (_USER_DEFINED,))

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes (keys `tokenizer.ggml.*`).

        Raises `UnsupportedModelError` for a model or pre-tokenizer that is not known here, and
        `CorruptFileError` for missing, ill-typed or contradictory keys.
        """
        kind = _optional_text(metadata, "tokenizer.ggml.model")
        if kind is None:
            raise CorruptFileError("metadata key tokenizer.ggml.model is missing")
        if kind not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"tokenizer model {kind!r:.60} is not supported; supported: gpt2, llama"
            )
        vocab = _read_vocab(metadata, _pre_tokenizer(metadata) if kind == "gpt2" else None)
        model = _spm_model(metadata, vocab) if vocab.pre is None else _bpe_model(metadata, vocab)
        return cls(vocab, model)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model may have more rows in its output than this."""
        return len(self._vocab.tokens)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if the file names one."""
        return self._vocab.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the file names one."""
        return self._vocab.eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: end of text, of turn and of message; eos first."""
        return self._vocab.stop_ids

    @property
    def add_bos(self) -> bool:
        """Whether `encode` puts `bos_id` first when `add_special` is set."""
        return self._vocab.add_bos

    @property
    def chat_template(self) -> str | None:
        """Source of the file's Jinja chat template: untrusted code, render it in a sandbox only."""
        return self._vocab.chat_template

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it (byte letters, U+2581 for a space)."""
        return self._vocab.tokens[self._checked(token_id)]

    def token_bytes(self, token_id: int, *, special: bool = True) -> bytes:
        """What the token adds to a text; may be a part of a UTF-8 character. Empty for control and
        unknown tokens when `special` is False."""
        text, kind = self.token_text(token_id), self._vocab.kinds[token_id]
        if kind in (_UNKNOWN, _CONTROL):
            return text.encode() if special else b""
        if kind == _USER_DEFINED:
            return text.encode()
        if self._vocab.pre is None:
            byte = self._vocab.byte_of.get(token_id)
            return text.replace(_SPACE, " ").encode() if byte is None else bytes((byte,))
        return b"".join(_letter_bytes(letter) for letter in text)

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
        if not add_special:
            return ids
        begin = [self._vocab.bos_id] if self._vocab.add_bos else []
        end = [self._vocab.eos_id] if self._vocab.add_eos else []
        return [token_id for token_id in (*begin, *ids, *end) if token_id is not None]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises `RequestError` for an
        id outside the vocabulary."""
        decoder = self.incremental(skip_special=skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()

    def incremental(self, *, skip_special: bool = True) -> IncrementalDecoder:
        """A decoder for one text whose tokens arrive one by one."""
        return IncrementalDecoder(self, self._vocab, skip_special)

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the vocabulary [0, {self.vocab_size})"
            )
        return token_id


class IncrementalDecoder:
    """Text of one answer as its tokens arrive. A UTF-8 character is never split; what was pushed,
    joined with `finish()`, equals `Tokenizer.decode` of all the ids. State: up to 3 bytes."""

    def __init__(self, tokenizer: Tokenizer, vocab: _Vocab, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._kinds = vocab.kinds
        self._special = not skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = vocab.add_space_prefix

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty. Invalid bytes become U+FFFD as soon
        as they are known to be invalid. Raises `RequestError` for an id outside the vocabulary."""
        piece = self._tokenizer.token_bytes(token_id, special=self._special)
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
    """What a file says about its tokens. `pre` is None for SPM; `kinds[i]` is the token type."""

    tokens: list[str]
    ids: dict[str, int]
    kinds: list[int]
    pre: _PreTokenizer | None
    byte_of: dict[int, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def _read_vocab(metadata: Metadata, pre: _PreTokenizer | None) -> _Vocab:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    ids = _distinct(tokens)
    kinds = _kinds(metadata, len(tokens))
    for name in _END_NAMES:  # some converters forget to mark these
        if name in ids:
            kinds[ids[name]] = _CONTROL
    bos_id, eos_id, unknown_id, eot_id, eom_id = (
        _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "unknown", "eot", "eom")
    )
    ends = (eos_id, eot_id, eom_id, *(ids.get(name) for name in _END_NAMES))
    bos_wanted = bos_id is not None and (pre is None or pre.add_bos)
    return _Vocab(
        tokens=tokens,
        ids=ids,
        kinds=kinds,
        pre=pre,
        byte_of={ids[name]: byte for byte in range(256) if (name := f"<0x{byte:02X}>") in ids},
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        stop_ids=tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        add_bos=_adds(metadata, "bos", bos_id, default=bos_wanted),
        add_eos=_adds(metadata, "eos", eos_id, default=False),
        add_space_prefix=_flag(metadata, "tokenizer.ggml.add_space_prefix", True) and pre is None,
        chat_template=_optional_text(metadata, "tokenizer.chat_template"),
    )


def _kinds(metadata: Metadata, count: int) -> list[int]:
    """The type of each token; a file without types has plain text only."""
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return [_NORMAL] * count
    kinds: list[int] = _numbers(metadata, key, "iu", count).tolist()
    return kinds


def _regex(pattern: str) -> Regex:
    """A pattern with its Unicode classes cut down to what llama.cpp knows."""
    for name in (r"\p{L}", r"\p{N}", r"\p{P}"):
        pattern = pattern.replace(name, f"[{name}&&[^{_NEWER}]]")
    return Regex(pattern)


def _engine(vocab: _Vocab, model: BPE, kinds: tuple[int, ...]) -> Engine:
    """The library's tokenizer over `model` (shared, not copied), which finds tokens of these
    `kinds` in the raw text before anything else looks at it."""
    engine = Engine(model)
    if vocab.pre is None:
        escape = normalizers.Replace(" ", _SPACE)
        prefix = [normalizers.Prepend(_SPACE)] if vocab.add_space_prefix else []
        engine.normalizer = normalizers.Sequence([*prefix, escape])
    else:
        cuts = [pre_tokenizers.Split(_regex(pattern), "isolated") for pattern in vocab.pre.regexes]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    engine.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(vocab.tokens, vocab.kinds, strict=True)
            if kind in kinds
        ]
    )
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
    if len(set(merges)) != len(merges):
        raise CorruptFileError(
            f"{len(merges) - len(set(merges))} of {len(merges)} merges are duplicates"
        )
    return BPE(vocab.ids, merges, ignore_merges=vocab.pre is not None and vocab.pre.whole_words)


def _spm_model(metadata: Metadata, vocab: _Vocab) -> BPE:
    """Merges from scores: two neighbours merge if their text is a token, the highest score first,
    so every way to cut a token in two becomes a merge with the rank of the token's score.

    Any token can be made this way, whatever its kind, as in llama.cpp.
    """
    tokens, ids = vocab.tokens, vocab.ids
    scores = _numbers(metadata, "tokenizer.ggml.scores", "f", len(tokens))
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise CorruptFileError(f"the score of token {bad} is {scores[bad]}, not a finite number")
    merges = []
    for token_id in np.argsort(-scores, kind="stable").tolist():
        token = tokens[token_id]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((left, right))
    unknown = None if vocab.unknown_id is None else tokens[vocab.unknown_id]
    return BPE(ids, merges, unk_token=unknown, byte_fallback=True)


def _letter_bytes(letter: str) -> bytes:
    byte = _BYTE_OF_LETTER.get(ord(letter))
    return letter.encode() if byte is None else bytes((byte,))


def _pre_tokenizer(metadata: Metadata) -> _PreTokenizer:
    name = _optional_text(metadata, "tokenizer.ggml.pre") or "default"
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"pre-tokenizer {name!r:.60} is not supported; supported: {known}"
        )
    return _PRE_TOKENIZERS[name]


def _distinct(tokens: list[str]) -> dict[str, int]:
    if not tokens:
        raise CorruptFileError("tokenizer.ggml.tokens is empty")
    ids: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        first = ids.setdefault(token, token_id)
        if first != token_id:
            raise CorruptFileError(f"tokens {first} and {token_id} are both {token!r:.60}")
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


def _adds(metadata: Metadata, name: str, token_id: int | None, default: bool) -> bool:
    """Whether every text gets this token; then there must be one."""
    key = f"tokenizer.ggml.add_{name}_token"
    wanted = _flag(metadata, key, default)
    if wanted and token_id is None:
        raise CorruptFileError(f"{key} is set, but tokenizer.ggml.{name}_token_id is missing")
    return wanted
