"""The arithmetic of a whole real model against llama.cpp: the same next tokens and perplexity.

llama.cpp rounds activations to 8 bits when weights are quantised, so its answer on a Q4_1 file is
itself an approximation: over this text it agrees with its own float32 arithmetic on the same
weights in 96% of the next tokens. The judge is therefore llama.cpp on the file's weights written
out as F32; against the quantised file we may be as far as llama.cpp is from itself.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from sharding.gguf.quants import dequantise
from sharding.gguf.reader import GGUFFile
from sharding.gguf.tokenizer import Tokenizer
from tests.peer import Peer, llama_cpp
from tests.stages import chunked_logits, load_stages
from tests.tiny_gguf import file_head, padded, tensor_entry, text

pytestmark = [pytest.mark.peer, pytest.mark.slow]

ENGLISH = Path(__file__).parent.parent / "data" / "english.txt"


@dataclass(frozen=True)
class Forecast:
    """The likeliest successor of each prefix, and the log-probability of the true one."""

    likeliest: list[int]
    true: list[float]

    def agreement(self, other: Forecast) -> float:
        """Share of prefixes with the same likeliest successor."""
        pairs = zip(self.likeliest, other.likeliest, strict=True)
        return sum(mine == theirs for mine, theirs in pairs) / len(self.true)

    def perplexity_ratio(self, other: Forecast) -> float:
        """Our perplexity over the other's."""
        return math.exp((sum(other.true) - sum(self.true)) / len(self.true))


def peer_forecast(path: Path, tokens: list[int], since: int, vocab: int) -> Forecast:
    """Teacher-forced, prefix by prefix; llama.cpp keeps the KV of the last one."""
    ends = range(since, len(tokens))
    with llama_cpp(path, context=1024, threads=1) as peer:
        found = [_successors(peer, tokens[:at], tokens[at], vocab) for at in ends]
    likeliest = [next(iter(successors)) for successors in found]
    true = [successors[token] for successors, token in zip(found, tokens[since:], strict=True)]
    return Forecast(likeliest, true)


def _successors(peer: Peer, prefix: list[int], true: int, vocab: int) -> dict[int, float]:
    for most in (100, 4000, vocab):  # all of them take half a second
        found = peer.next_logprobs(prefix, most)
        if true in found:
            return found
    raise AssertionError(f"llama.cpp knows no token {true}")


def write_as_float32(file: GGUFFile, path: Path) -> None:
    """The same model with every weight written out; its keys byte for byte."""
    raw = file.paths[0].read_bytes()
    keys_at, table_at = 24, raw.index(text(next(iter(file.tensors))))
    version, tensors, keys = struct.unpack("<IQQ", raw[4:keys_at])
    table, offset = b"", 0
    for name, info in file.tensors.items():
        table += tensor_entry(name, info.shape, gguf.GGMLQuantizationType.F32, offset)
        offset += 4 * info.elements
        assert offset % 32 == 0, "a tensor that needs filling up"
    with path.open("wb") as to:
        to.write(padded(file_head(tensors, keys, version) + raw[keys_at:table_at] + table))
        for name, info in file.tensors.items():
            to.write(np.ascontiguousarray(dequantise(info.format, file.raw(name))).data)


def check_english(
    file: GGUFFile, since: int, count: int, tmp_path: Path
) -> tuple[list[int], Forecast, Forecast]:
    """What follows each of the prefixes of `since` to `count` tokens; the tokens, our forecast and
    the judge's."""
    tokenizer = Tokenizer.from_metadata(file.metadata)
    tokens = tokenizer.encode(ENGLISH.read_text())[: count + 1]
    assert len(tokens) == count + 1
    logprobs = chunked_logits(load_stages(file, 2), tokens[:-1], 512).log_softmax(-1)
    true = [logprobs[at - 1, tokens[at]].item() for at in range(since, len(tokens))]
    ours = Forecast(logprobs[since - 1 :].argmax(-1).tolist(), true)

    write_as_float32(file, tmp_path / "float32.gguf")
    judge = peer_forecast(tmp_path / "float32.gguf", tokens, since, tokenizer.vocab_size)
    assert ours.agreement(judge) >= 0.98
    assert ours.perplexity_ratio(judge) == pytest.approx(1, abs=0.005)
    return tokens, ours, judge


def test_teacher_forced_english_agrees_with_llama_cpp(smollm2: GGUFFile, tmp_path: Path) -> None:
    tokens, ours, judge = check_english(smollm2, 1, 384, tmp_path)
    vocab = Tokenizer.from_metadata(smollm2.metadata).vocab_size
    quantised = peer_forecast(smollm2.paths[0], tokens, 1, vocab)
    assert ours.agreement(quantised) >= judge.agreement(quantised) - 0.01
    assert ours.perplexity_ratio(quantised) == pytest.approx(1, abs=0.005)


def test_gemma3_agrees_with_llama_cpp(gemma3_path: Path, tmp_path: Path) -> None:
    """Past the end of its window of 512 tokens. llama.cpp on the quantised file is no
    judge here: what it rounds costs it 0.8% of its own perplexity."""
    with GGUFFile.open(gemma3_path) as file:
        check_english(file, 514, 548, tmp_path)
