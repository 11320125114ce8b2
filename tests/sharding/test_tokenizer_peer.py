"""The same tokens as llama.cpp, text by text, on real vocabularies.

llama.cpp runs inside this process as its own HTTP server (xllamacpp) and tokenises over /tokenize.
Only vocabularies of two real files are at hand; other pre-tokenizers and SPM with a space before
the text are compared on models of a few kilobytes that are written here.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import numpy as np
import pytest

from sharding.gguf.reader import GGUFFile
from sharding.gguf.tokenizer import Tokenizer

pytestmark = pytest.mark.peer

Tokenize = Callable[[str, bool, bool], list[int]]
"""text, add_special, parse_special -> token ids."""

# fmt: off
SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end", "<bos>", "<eos>", "<unk>", "<pad>",
    "<start_of_turn>user\n", "<end_of_turn>", "<unused7>", "<table>", "</td>", "[multimodal]",
    "<0x0A>", "<s>", "</s>", "\u2581", "\u2581\u2581",
)
SPACES = (
    " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r", "\r\n", " \n", "\n ", "\x0b", "\x0c",
    "\u00a0", "\u0085", "\u2028", "\u2029", "\u3000", "\u200a", "\u1680", "\u202f", " " * 40,
    "\n" * 40, "\t" * 40,
)
ODD = (
    "\x00", "\x01", "\x1c", "\x1f", "\x7f", "\u0080", "\u009f", "\u00ad", "\u200b", "\u200d",
    "\ufeff", "\ufffd", "\u180e", "\u017f", "\u212a", "\u0130", "\u01c5", "\u00aa", "\u00bd",
    "\u00b2", "\u2167", "\u3007", "\u0e33", "\U00010d4a", "\U0001e950", "\U000e0001", "\U0010fffd",
    "e\u0301", "o\u0308\u0323", "\u0915\u094d\u0937\u093f", "\U0001f469\U0001f3fd\u200d\U0001f680",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "1\ufe0f\u20e3",
)
WORDS = (
    "the", "The", "world", "Hello", "internationalisation", "tokens", "a", "I", "GPU", "naïve",
    "I'm", "I'M", "don't", "DON'T", "we'LL", "they've", "'s", "'S", "x'd", "it's's", "\u2019s",
    "def", "return", "self.x", "for(int", "i=0;i<n;++i)", "{", "}", "=>", "!=", "->", "0x1F",
    "camelCaseName", "snake_case_name", "https://example.org/a?b=c&d#e", "a@b.example", "$1,234.56",
)
ALPHABETS = (
    (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x58A), (0x591, 0x5F4),
    (0x600, 0x6FF), (0x900, 0x97F), (0xB80, 0xBFF), (0xE01, 0xE5B), (0x10A0, 0x10FF),
    (0x1200, 0x137F), (0x1780, 0x17F9), (0x2000, 0x206F), (0x2190, 0x23FF), (0x3041, 0x30FF),
    (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x10330, 0x1034A), (0x12000, 0x12399),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
)
# fmt: on
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u00bf\u2014\u2026\u3002\u20ac\u00a7"


def _any_script(rng: random.Random) -> str:
    low, high = rng.choice(ALPHABETS)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))


MAKERS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: rng.choice(WORDS),
    lambda rng: rng.choice(WORDS) + " " + rng.choice(WORDS),
    lambda rng: rng.choice(SPACES),
    lambda rng: rng.choice(SPACES) + rng.choice(SPACES),
    lambda rng: rng.choice(ODD),
    lambda rng: rng.choice(SPECIALS),
    _any_script,
    lambda rng: str(rng.randrange(10 ** rng.randint(1, 12))),
    lambda rng: "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 6))),
    lambda rng: rng.choice(PUNCTUATION + "abz") * rng.randint(1, 70),
    lambda rng: "".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 90))),
    lambda rng: chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
)


def _samples(count: int) -> list[str]:
    rng = random.Random(20261)
    mixed = (
        "".join(rng.choice(MAKERS)(rng) for _ in range(rng.randint(1, 12))) for _ in range(count)
    )
    return ["", *SPECIALS, *SPACES, *ODD, *WORDS, *mixed][:count]


SAMPLES = _samples(2000)


@contextmanager
def _llama_cpp(model: Path) -> Iterator[Tokenize]:
    """llama.cpp's server with this model, ended with the block."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.port = 64, 1, 0
    params.cpuparams.n_threads = params.n_threads_http = 1
    params.warmup, params.ui, params.verbosity = False, False, -1
    server = xllamacpp.Server(params)
    # One connection for all texts: opening one takes longer than to tokenise.
    connection = HTTPConnection(urlsplit(server.listening_address).netloc)

    def tokenize(text: str, add_special: bool, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/tokenize", json.dumps(body), headers)
        tokens: list[int] = json.load(connection.getresponse())["tokens"]
        return tokens

    try:
        with closing(connection):
            yield tokenize
    finally:
        del server  # its destructor stops the threads and closes the port


def _assert_equal(metadata: Mapping[str, Any], model: Path, samples: list[str]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    with _llama_cpp(model) as tokenize:
        different = [
            (text, parse_special, ours, theirs)
            for text in samples
            for parse_special in (True, False)
            if (ours := tokenizer.encode(text, parse_special=parse_special))
            != (theirs := tokenize(text, True, parse_special))
        ]
    assert not different, f"{len(different)} of {2 * len(samples)}, first {different[:3]}"


def _write_model(path: Path, metadata: Mapping[str, Any]) -> None:
    """A llama model of one block and 32 columns of zeros around a tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    vocab, width = len(metadata["tokenizer.ggml.tokens"]), 32
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    for add in (writer.add_context_length, writer.add_embedding_length):
        add(width)
    writer.add_feed_forward_length(width)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, (list, np.ndarray)):
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((vocab, width), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer_keys(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}


def test_smollm2_equals_llama_cpp(smollm2_path: Path) -> None:
    _assert_equal(_tokenizer_keys(smollm2_path), smollm2_path, SAMPLES)


def test_gemma3_equals_llama_cpp(gemma3_path: Path) -> None:
    samples = [text.replace("</s>", "</i>") for text in SAMPLES]  # see the next test
    _assert_equal(_tokenizer_keys(gemma3_path), gemma3_path, samples)


def test_gemma3_may_write_struck_out_html(gemma3_path: Path) -> None:
    """The one known difference: `</s>` is a user-defined HTML tag in this file, but llama.cpp
    takes any token of that name for an end of text. Ours must not vanish from an answer."""
    tokenizer = Tokenizer.from_metadata(_tokenizer_keys(gemma3_path))
    with _llama_cpp(gemma3_path) as tokenize:
        (tag,) = tokenize("</s>", False, True)
        assert len(tokenize("</s>", False, False)) > 1
    for parse_special in (True, False):
        ids = tokenizer.encode("</s>", add_special=False, parse_special=parse_special)
        assert ids == [tag]
    assert tokenizer.decode([tag]) == "</s>"
    assert tag not in tokenizer.stop_ids


@pytest.mark.parametrize(
    "pre", ["llama-bpe", "falcon3", "qwen2", "deepseek-r1-qwen", "dbrx", "gpt-2", "default"]
)
def test_other_pre_tokenizers_equal_llama_cpp(pre: str, smollm2_path: Path, tmp_path: Path) -> None:
    """SmolLM2's vocabulary, cut by the regexes of other families. Without its `add_bos_token`, so
    that each family's own default shows."""
    metadata = {**_tokenizer_keys(smollm2_path), "tokenizer.ggml.pre": pre}
    del metadata["tokenizer.ggml.add_bos_token"]
    _write_model(tmp_path / "model.gguf", metadata)
    _assert_equal(metadata, tmp_path / "model.gguf", SAMPLES)


def _approximated(character: str) -> bool:
    """Whether llama.cpp's regex for tekken may take it for another kind than the tokenizer's own:
    capitals and small letters beyond ASCII, marks, and what this Python does not know yet."""
    category = unicodedata.category(character)
    return character > "\x7f" and category in {"Lu", "Ll", "Lt", "Mn", "Mc", "Me", "Cn"}


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default", "tekken"])
def test_every_cut_is_where_llama_cpp_cuts(pre: str, tmp_path: Path) -> None:
    """A vocabulary in which each of a few common letters merges with any byte beside it shows
    cuts that a trained one hides; characters of all scripts stand between such letters."""
    letters = {byte: chr(letter) for letter, byte in _byte_letters().items()}
    around = [letters[byte] for byte in b"a1! \n'"]
    pairs = [(left, right) for left in around for right in letters.values()]
    pairs = list(dict.fromkeys([*pairs, *((right, left) for left, right in pairs)]))
    tokens = list(dict.fromkeys([*letters.values(), *(left + right for left, right in pairs)]))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(len(tokens), np.int32),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    codes = [*range(0x3400), *range(0x3400, 0x32000, 13)]
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    texts = SAMPLES[:500]
    if pre == "tekken":
        characters = [c for c in characters if not _approximated(c)]
        texts = [text for text in texts if not any(map(_approximated, text))]
    runs = [characters[start : start + 1024] for start in range(0, len(characters), 1024)]
    borders = (("a", "a"), ("1", "1"), ("!", "!"), (" ", " "), ("a", " a"), ("!\n", "\n"))
    samples = ["".join(f"{a}{c}{b}" for c in run) for run in runs for a, b in borders]
    _write_model(tmp_path / "model.gguf", metadata)
    _assert_equal(metadata, tmp_path / "model.gguf", [*samples, *texts])


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_spm_with_a_space_before_the_text_equals_llama_cpp(
    add_space_prefix: bool, tmp_path: Path
) -> None:
    """Llama 2's way; Gemma's file switches it off. Pieces: the samples' characters but some, and
    their commonest substrings, scored by rank."""
    escaped = [text.replace(" ", "\u2581") for text in SAMPLES]
    found = Counter(
        text[start : start + length]
        for text in escaped
        for length in (2, 3, 4, 6)
        for start in range(len(text) - length + 1)
    )
    alphabet = sorted({character for text in escaped for character in text})
    kept = [c for index, c in enumerate(alphabet) if index % 5 or c == "\u2581"]
    common = [piece for piece, _ in found.most_common(4000) if set(piece) <= set(kept)]
    runs = [
        (["<unk>"], 2),
        (["<s>", "</s>", "<|im_end|>"], 3),
        (["<table>", "\n\n", "\t\t\t"], 4),
        ([f"<0x{byte:02X}>" for byte in range(256)], 6),
        (
            [piece for piece in dict.fromkeys([*common, *kept]) if piece not in ("\n\n", "\t\t\t")],
            1,
        ),
    ]
    tokens = [token for run, _ in runs for token in run]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.repeat([k for _, k in runs], [len(r) for r, _ in runs]),
        "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }
    _write_model(tmp_path / "model.gguf", metadata)
    _assert_equal(metadata, tmp_path / "model.gguf", SAMPLES)


def _byte_letters() -> dict[int, int]:
    """From character to byte in a byte-level vocabulary; the gguf package has no such table."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = sorted(set(range(256)) - printable)
    return {**{byte: byte for byte in printable}, **{256 + i: b for i, b in enumerate(others)}}
