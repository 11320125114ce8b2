"""How byte-level vocabularies cut text before merging, by the names of `tokenizer.ggml.pre`.

The regexes are those of the models' own tokenizers; llama.cpp cuts the same way but where it says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Regex


@dataclass(frozen=True)
class PreTokenizer:
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

# Words begin with capitals. llama.cpp approximates: it takes every letter beyond ASCII for both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Letters, digits and punctuation that came with Unicode 16: the regex library knows them, llama.cpp
# (Unicode 15) does not, and takes them for symbols.
_NEWER = (
    r"\x{1B4E}\x{1B4F}\x{1B7F}\x{1C89}\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}"
    r"\x{105C0}-\x{105F3}\x{10D40}-\x{10D85}\x{10EC2}-\x{10EC4}\x{11380}-\x{113D8}"
    r"\x{116D0}-\x{116E3}\x{11BC0}-\x{11BF9}\x{13460}-\x{143FA}\x{16100}-\x{16139}"
    r"\x{16D40}-\x{16D79}\x{18CFF}\x{1CCF0}-\x{1CCF9}\x{1E5D0}-\x{1E5FF}"
)

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "dbrx": PreTokenizer((_LLAMA3 % r"\p{N}{1,3}",)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": PreTokenizer((_LLAMA3 % r"\p{N}{1,3}",), whole_words=True, add_bos=True),
    "qwen2": PreTokenizer((_LLAMA3 % r"\p{N}",)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}
PRE_TOKENIZERS |= dict.fromkeys(("falcon3", "llama3", "llama-v3"), PRE_TOKENIZERS["llama-bpe"])
PRE_TOKENIZERS["deepseek-r1-qwen"] = PRE_TOKENIZERS["qwen2"]


def regex_of(pattern: str) -> Regex:
    """A pattern with its Unicode classes cut down to what llama.cpp knows."""
    return Regex(re.sub(r"\\p{\w+}", lambda name: f"[{name[0]}&&[^{_NEWER}]]", pattern))
