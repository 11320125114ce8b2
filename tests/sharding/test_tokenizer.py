"""Tokenizers over tiny vocabularies made here: what a text becomes, and what comes back.

Equality with llama.cpp on real vocabularies is `test_tokenizer_peer.py`'s business.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel, Split

from sharding.errors import CorruptFileError, RequestError, UnsupportedModelError
from sharding.gguf.pre_tokenizers import PRE_TOKENIZERS, regex_of
from sharding.gguf.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
PRES = ("smollm", "llama-bpe", "qwen2", "gpt-2", "default", "tekken")
SPECIALS = {
    "<s>": CONTROL,
    "<|im_end|>": CONTROL,
    "<tag>": USER_DEFINED,
    "<tag><tag>": USER_DEFINED,
}
BOS, END, TAG, TAGS = range(4)

# "\u0120" is the byte letter of a space, "\u00f0" that of 0xF0, which begins U+10000 and on.
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 hello", "1 2", "12 3", "' M", "a \u00f0"]


def bpe(**keys: object) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary with every byte; `keys` replace its own,
    None removes one."""
    made = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *made]
    kinds = [*SPECIALS.values(), *[NORMAL] * (len(tokens) - len(SPECIALS))]
    own = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "merges": MERGES,
        "bos_token_id": BOS,
        "eos_token_id": END,
    }
    merged = {**own, **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in merged.items() if value is not None}


def spm(pieces: dict[str, float], **keys: object) -> dict[str, Any]:
    """Metadata of an SPM vocabulary: the specials, 256 byte tokens, then `pieces` with scores."""
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [*SPECIALS.values(), *[6] * 256, *[NORMAL] * len(pieces)]
    own = {
        "model": "llama",
        "tokens": [*SPECIALS, *byte_names, *pieces],
        "token_type": np.array(kinds, np.int32),
        "scores": np.array([-1e4] * 260 + list(pieces.values()), np.float32),
        "bos_token_id": BOS,
        "eos_token_id": END,
    }
    merged = {**own, **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in merged.items() if value is not None}


def texts(tokenizer: Tokenizer, text: str, parse_special: bool = True) -> list[str]:
    ids = tokenizer.encode(text, add_special=False, parse_special=parse_special)
    return [tokenizer.token_text(token_id) for token_id in ids]


LETTERS = {"\u2581": -20.0, "a": -21.0, "b": -22.0, "c": -23.0, "\u00e9": -24.0}
BPE = Tokenizer.from_metadata(bpe())
SPM = Tokenizer.from_metadata(spm({**LETTERS, "ab": -2.0, "bc": -1.0, "\u2581a": -3.0}))


@pytest.mark.parametrize("pre", PRES)
def test_any_text_survives_a_byte_level_round_trip(pre: str) -> None:
    """A regex that leaves characters out of every piece would lose them silently."""
    tokenizer = Tokenizer.from_metadata(bpe(pre=pre))

    @given(st.text())
    @example("\r\n \t\u00a0\u2028 12345 I'M don't \U0001f468\u200d\U0001f469 e\u0301\x00")
    @settings(max_examples=60, deadline=None)
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids, skip_special=False) == text

    check()


@given(st.text().filter(lambda text: "\u2581" not in text))
@settings(max_examples=100, deadline=None)
@example(" a")
@example("")
def test_any_text_survives_an_spm_round_trip(text: str) -> None:
    """The space put before a text must go again, and only that one."""
    if "<tag>" not in text:
        assert SPM.decode(SPM.encode(text, parse_special=False)) == text


def test_merges_go_by_rank() -> None:
    assert texts(BPE, "hello hello") == ["hello", "\u0120hello"]
    assert texts(BPE, "hel") == ["he", "l"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "1"]),
        ("qwen2", ["1", "2", "3", "1"]),
        ("llama-bpe", ["123", "1"]),
        ("llama3", ["123", "1"]),
        ("gpt-2", ["123", "1"]),
        ("tekken", ["1", "2", "3", "1"]),
        (None, ["123", "1"]),
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(pre: str | None, pieces: list[str]) -> None:
    assert texts(Tokenizer.from_metadata(bpe(pre=pre)), "1231") == pieces


@pytest.mark.parametrize(("pre", "pieces"), [("llama-bpe", ["'M"]), ("gpt-2", ["'", "M"])])
def test_upper_case_contractions_are_whole_in_llama3_only(pre: str, pieces: list[str]) -> None:
    assert texts(Tokenizer.from_metadata(bpe(pre=pre)), "I'M") == ["I", *pieces]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("getURLFor", ["get", "URLFor"]),
        ("don'T stop", ["don", "'T", " stop"]),
        ("\u00c0B\u00e9C", ["\u00c0B\u00e9", "C"]),
        ("e\u0301t", ["e\u0301t"]),  # a mark belongs to its letter
        ("a //\n\nb", ["a", " //\n\n", "b"]),
        ("\u6f22A\u5b57", ["\u6f22A\u5b57"]),
    ],
)
def test_tekken_cuts_before_capitals(text: str, pieces: list[str]) -> None:
    """Mistral's tokenizer since NeMo: what llama.cpp approximates is taken exactly."""
    (regex,) = PRE_TOKENIZERS["tekken"].regexes
    cut = Split(regex_of(regex), "isolated").pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_llama3_takes_whole_words_without_merging() -> None:
    """Its vocabulary has words that no merge makes."""
    metadata = bpe(pre="llama-bpe", merges=MERGES[:4])
    assert texts(Tokenizer.from_metadata(metadata), " hello") == ["\u0120hello"]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert texts(Tokenizer.from_metadata(metadata), " hello") == ["\u0120", "hello"]


@pytest.mark.parametrize(("letter", "joined"), [("\U00010400", True), ("\U00010d4a", False)])
def test_letters_of_unicode_16_are_cut_off_as_llama_cpp_does(letter: str, joined: bool) -> None:
    """The regex library's Unicode tables are newer than llama.cpp's."""
    assert (texts(BPE, "a" + letter)[0] == "a\u00f0") == joined


def test_bytes_without_a_token_are_left_out() -> None:
    """SmolLM2 has no token for bytes that are rare in UTF-8."""
    metadata = bpe()
    metadata["tokenizer.ggml.tokens"] = [
        "unused" if token == "z" else token for token in metadata["tokenizer.ggml.tokens"]
    ]
    assert texts(Tokenizer.from_metadata(metadata), "xzx") == ["x", "x"]


@pytest.mark.parametrize("tokenizer", [BPE, SPM])
def test_control_tokens_are_found_only_when_asked(tokenizer: Tokenizer) -> None:
    """Else a user's text could end the turn and speak for the system."""
    assert tokenizer.encode("<|im_end|>", add_special=False) == [END]
    assert END not in tokenizer.encode("<|im_end|>", add_special=False, parse_special=False)


@pytest.mark.parametrize("parse_special", [True, False])
def test_user_defined_tokens_are_always_found_the_longest_first(parse_special: bool) -> None:
    ids = BPE.encode("<tag><tag><tag>", add_special=False, parse_special=parse_special)
    assert ids == [TAGS, TAG]


@pytest.mark.parametrize(
    ("metadata", "begin", "end"),
    [
        (bpe(), [], []),
        (bpe(pre="llama-bpe"), [BOS], []),
        (bpe(pre="llama-bpe", bos_token_id=None), [], []),
        (bpe(pre="llama-bpe", add_bos_token=False), [], []),
        (bpe(add_bos_token=True, add_eos_token=True), [BOS], [END]),
        (spm(LETTERS), [BOS], []),
        (spm(LETTERS, add_bos_token=False), [], []),
    ],
)
def test_begin_and_end_tokens_are_added_as_the_file_says(
    metadata: dict[str, Any], begin: list[int], end: list[int]
) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    inner = tokenizer.encode("b", add_special=False)
    assert tokenizer.encode("b") == [*begin, *inner, *end]
    assert tokenizer.encode("") == [*begin, *end]
    assert (tokenizer.add_bos, tokenizer.add_eos) == (bool(begin), bool(end))


def test_stop_ids_are_eos_then_every_known_end_of_turn() -> None:
    """A model that ends its turn with <|im_end|> must stop even if eos is another token."""
    assert Tokenizer.from_metadata(bpe(eos_token_id=BOS)).stop_ids == (BOS, END)
    tokenizer = Tokenizer.from_metadata(bpe(eot_token_id=TAG, eom_token_id=TAGS))
    assert tokenizer.stop_ids == (END, TAG, TAGS)


def test_an_end_of_turn_is_control_even_if_the_file_forgot() -> None:
    """Else it would be shown at the end of every answer."""
    tokenizer = Tokenizer.from_metadata(bpe(token_type=None))
    assert tokenizer.decode([END, *tokenizer.encode("a")]) == "a"


def test_facts_of_the_file_are_told() -> None:
    metadata = {**bpe(), "tokenizer.chat_template": "{{ x }}"}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS, END)
    assert tokenizer.chat_template == "{{ x }}"
    assert BPE.chat_template is None


def test_token_bytes_may_be_part_of_a_character() -> None:
    assert b"".join(BPE.token_bytes(i) for i in BPE.encode("\u20ac")) == b"\xe2\x82\xac"
    assert len(BPE.encode("\u20ac")) == 3
    assert b"".join(SPM.token_bytes(i) for i in SPM.encode("\u20ac")[2:]) == b"\xe2\x82\xac"


@pytest.mark.parametrize("tokenizer", [BPE, SPM])
def test_control_tokens_vanish_from_plain_text_and_user_defined_do_not(
    tokenizer: Tokenizer,
) -> None:
    assert tokenizer.token_bytes(END) == b"<|im_end|>"
    assert tokenizer.token_bytes(END, special=False) == b""
    assert tokenizer.token_bytes(TAG, special=False) == b"<tag>"
    assert tokenizer.decode([BOS, TAG, END]) == "<tag>"
    assert tokenizer.decode([BOS, TAG, END], skip_special=False) == "<s><tag><|im_end|>"


def test_spm_merges_the_highest_score_first() -> None:
    """Not the leftmost pair, and not the longest piece."""
    assert texts(SPM, "abc") == ["\u2581a", "bc"]


def test_spm_spells_unknown_characters_in_bytes() -> None:
    assert texts(SPM, "a\u20ac") == ["\u2581a", "<0xE2>", "<0x82>", "<0xAC>"]


def test_spm_without_byte_tokens_has_an_unknown_token() -> None:
    pieces = ["<unk>", "\u2581", "a"]
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": np.array([UNKNOWN, NORMAL, NORMAL], np.int32),
            "tokenizer.ggml.scores": np.zeros(3, np.float32),
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )
    assert texts(tokenizer, "a?") == ["\u2581", "a", "<unk>"]
    assert tokenizer.decode([2, 0]) == "a"


@pytest.mark.parametrize(("prefix", "first"), [(None, "\u2581a"), (False, "a")])
def test_spm_puts_a_space_before_text_unless_the_file_forbids(
    prefix: bool | None, first: str
) -> None:
    """After a control token too, as every stretch of plain text begins anew."""
    tokenizer = Tokenizer.from_metadata(spm({**LETTERS, "\u2581a": -1.0}, add_space_prefix=prefix))
    assert texts(tokenizer, "a<s>a") == [first, "<s>", first]


def test_only_the_space_that_began_the_text_is_dropped() -> None:
    prefixed = SPM.encode("a", add_special=False)
    assert SPM.decode([*prefixed, *prefixed]) == "a a"
    assert SPM.decode([BOS, *prefixed], skip_special=False) == "<s>a"
    assert SPM.decode([TAG, *prefixed]) == "<tag> a"


def greedy(scores: dict[str, float], text: str) -> list[str]:
    """The slow twin: merge the neighbours of the highest score, the left ones first, until none
    make a piece."""
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
        known = [(-scores[pair], at) for at, pair in enumerate(pairs) if pair in scores]
        if not known:
            return symbols
        at = min(known)[1]
        symbols[at : at + 2] = [pairs[at]]


@given(
    st.lists(st.text("ab\u2581", min_size=2, max_size=6), unique=True, max_size=12),
    st.randoms(use_true_random=False),
    st.lists(st.text("ab ", max_size=24), max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_spm_equals_greedy_merging_by_score(
    pieces: list[str], rng: random.Random, samples: list[str]
) -> None:
    """The merges that the library is given are ranked; SPM knows scores only."""
    names = ["\u2581", "a", "b", *pieces]
    scores = dict(zip(names, map(float, rng.sample(range(100), len(names))), strict=True))
    tokenizer = Tokenizer.from_metadata(spm(scores, add_space_prefix=False))
    for sample in samples:
        assert texts(tokenizer, sample) == greedy(scores, sample)


@pytest.mark.parametrize("tokenizer", [BPE, SPM])
@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_pushed_one_by_one_make_the_same_text(
    tokenizer: Tokenizer, skip_special: bool
) -> None:
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    @settings(max_examples=150, deadline=None)
    def check(ids: list[int]) -> None:
        decoder = tokenizer.incremental(skip_special=skip_special)
        pushed = "".join([decoder.push(i) for i in ids]) + decoder.finish()
        assert pushed == tokenizer.decode(ids, skip_special=skip_special)
        if not tokenizer.add_bos:  # no space to drop
            raw = b"".join(tokenizer.token_bytes(i, special=not skip_special) for i in ids)
            assert pushed == raw.decode("utf-8", "replace")

    check()


def test_a_character_is_pushed_whole_and_a_broken_one_at_once() -> None:
    """A client's terminal must not show half a character, nor wait for one that cannot come."""
    first, second, third = BPE.encode("\u20ac")
    (letter,) = BPE.encode("a")
    decoder = BPE.incremental()
    assert [decoder.push(i) for i in (first, second, third)] == ["", "", "\u20ac"]
    assert [decoder.push(i) for i in (first, letter)] == ["", "\ufffda"]
    assert decoder.push(third) == "\ufffd"
    assert [decoder.push(first), decoder.finish()] == ["", "\ufffd"]


def test_an_answer_keeps_the_space_before_its_first_word() -> None:
    """The space that `encode` puts before a text belongs to the prompt, not to what follows it."""
    spaced = SPM.encode("a")[-1]
    assert SPM.token_text(spaced) == "\u2581a"
    assert SPM.incremental().push(spaced) == "a"
    assert SPM.incremental(continues=True).push(spaced) == " a"


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    """JSON can carry one; no UTF-8 can."""
    with pytest.raises(RequestError, match=r"character 2 .* U\+D800"):
        BPE.encode("ab\ud800")


@pytest.mark.parametrize("token_id", [-1, BPE.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    """-1 would otherwise be the last token."""
    for use in (BPE.token_text, BPE.token_bytes, BPE.incremental().push):
        with pytest.raises(RequestError, match=rf"{token_id} is not in \[0, {BPE.vocab_size}\)"):
            use(token_id)
    with pytest.raises(RequestError):
        BPE.decode([token_id])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model": "bert"}, r"model 'bert' is not supported; supported: gpt2, llama"),
        ({"pre": "viking"}, r"pre 'viking' .*: dbrx, .*llama-bpe, .*qwen2, smollm, tekken"),
    ],
)
def test_an_unknown_tokenizer_is_named_with_those_that_work(
    keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        Tokenizer.from_metadata(bpe(**keys))


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (bpe(model=None), r"ggml\.model is missing"),
        (bpe(model=7), r"ggml\.model is missing or no string"),
        (bpe(pre=7), r"ggml\.pre is missing or no string"),
        (bpe(tokens=None), r"ggml\.tokens is missing"),
        (bpe(tokens=[]), r"ggml\.tokens is empty"),
        (bpe(tokens=["a", 7]), r"tokens\[1\] is 7, not a string"),
        (bpe(tokens=["a", "b", "a"]), r"tokens 0 and 2 are both 'a'"),
        (bpe(tokens=["a", "\udc80"]), r"ggml\.tokens holds text that is not valid Unicode"),
        (bpe(token_type=np.ones(3, np.int32)), r"token_type has 3 entries for 269 tokens"),
        (bpe(token_type=np.ones(269, np.float32)), r"token_type .* no array of the right numbers"),
        (bpe(merges=None), r"ggml\.merges is missing"),
        (bpe(merges=["h e", "he"]), r"merge 1 of 2, 'he', is not two tokens that make a third"),
        (bpe(merges=["h \u4e2d"]), r"merge 0 of 1"),
        (bpe(merges=["h l"]), r"merge 0 of 1"),
        (bpe(merges=["h e", "l l", "h e"]), r"1 of 3 merges are duplicates"),
        (bpe(bos_token_id=269), r"bos_token_id is 269, outside the vocabulary \[0, 269\)"),
        (bpe(eos_token_id=-1), r"eos_token_id is -1, outside"),
        (bpe(eot_token_id="</s>"), r"eot_token_id is '</s>', not a whole number"),
        (bpe(bos_token_id=None, add_bos_token=True), r"add_bos_token is set, but .* is missing"),
        (bpe(add_bos_token=1), r"add_bos_token is 1, not a boolean"),
        ({**bpe(), "tokenizer.chat_template": ["x"]}, r"chat_template is \['x'\], not a string"),
        (spm(LETTERS, scores=None), r"ggml\.scores is missing"),
        (spm(LETTERS, scores=np.zeros(2, np.float32)), r"scores has 2 entries for 265 tokens"),
        (spm({**LETTERS, "ab": float("nan")}), r"score of token 265 is nan"),
        (spm({**LETTERS, "a" * 600: 0.0}), r"token 265 has 600 characters; at most 512"),
    ],
)
def test_a_broken_file_is_refused_with_what_is_wrong(metadata: dict[str, Any], told: str) -> None:
    with pytest.raises(CorruptFileError, match=told):
        Tokenizer.from_metadata(metadata)
