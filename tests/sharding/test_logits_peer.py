"""The arithmetic of a whole real model against llama.cpp: the same next tokens and perplexity.

llama.cpp rounds activations to 8 bits when weights are quantised, so its answer on a Q4_1 file is
itself an approximation: over this text it agrees with its own float32 arithmetic on the same
weights in 96% of the next tokens. The judge is therefore llama.cpp on the file's weights written
out as F32; against the quantised file we may be as far as llama.cpp is from itself.
"""

from __future__ import annotations

import math
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

pytestmark = [pytest.mark.peer, pytest.mark.slow]

TOKENS = 384
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


def peer_forecast(path: Path, tokens: list[int], vocab: int) -> Forecast:
    """Teacher-forced, prefix by prefix; llama.cpp keeps the KV of the last one."""
    with llama_cpp(path, context=1024, threads=1) as peer:
        found = [_successors(peer, tokens[:at], tokens[at], vocab) for at in range(1, len(tokens))]
    likeliest = [next(iter(successors)) for successors in found]
    true = [successors[token] for successors, token in zip(found, tokens[1:], strict=True)]
    return Forecast(likeliest, true)


def _successors(peer: Peer, prefix: list[int], true: int, vocab: int) -> dict[int, float]:
    for most in (100, 4000, vocab):  # all of them take half a second
        found = peer.next_logprobs(prefix, most)
        if true in found:
            return found
    raise AssertionError(f"llama.cpp knows no token {true}")


def write_as_float32(file: GGUFFile, path: Path) -> None:
    """The same model with every weight written out."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in gguf.GGUFReader(file.paths[0]).fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind, *inner = field.types
        sub_type = inner[-1] if inner else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub_type)
    for name, info in file.tensors.items():
        values = dequantise(info.format, file.raw(name)).reshape(info.shape[::-1])
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_teacher_forced_english_agrees_with_llama_cpp(
    smollm2: GGUFFile, smollm2_path: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_metadata(smollm2.metadata)
    tokens = tokenizer.encode(ENGLISH.read_text())[: TOKENS + 1]
    assert len(tokens) == TOKENS + 1
    logprobs = chunked_logits(load_stages(smollm2, 2), tokens[:-1], 512).log_softmax(-1)
    true = [logprobs[at, token].item() for at, token in enumerate(tokens[1:])]
    ours = Forecast(logprobs.argmax(-1).tolist(), true)

    write_as_float32(smollm2, tmp_path / "float32.gguf")
    judge = peer_forecast(tmp_path / "float32.gguf", tokens, tokenizer.vocab_size)
    assert ours.agreement(judge) >= 0.98
    assert ours.perplexity_ratio(judge) == pytest.approx(1, abs=0.005)

    quantised = peer_forecast(smollm2_path, tokens, tokenizer.vocab_size)
    assert ours.agreement(quantised) >= judge.agreement(quantised) - 0.01
    assert ours.perplexity_ratio(quantised) == pytest.approx(1, abs=0.005)
