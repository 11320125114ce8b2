"""The arithmetic of a whole real model against llama.cpp: the same next tokens, the same perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sharding.gguf.reader import GGUFFile
from sharding.gguf.tokenizer import Tokenizer
from tests.peer import Peer, llama_cpp
from tests.stages import chunked_logits, load_stages

pytestmark = [pytest.mark.peer, pytest.mark.slow]

TOKENS = 512
ENGLISH = Path(__file__).parent.parent / "data" / "english.txt"


def peer_logprobs(peer: Peer, tokens: list[int], vocab: int) -> tuple[list[int], list[float]]:
    """llama.cpp's likeliest successor of each prefix, and the log-probability of the true one."""
    likeliest, true = [], []
    for stop in range(1, len(tokens)):
        found = peer.next_logprobs(tokens[:stop], 100)
        likeliest.append(next(iter(found)))
        if tokens[stop] not in found:
            found = peer.next_logprobs(tokens[:stop], vocab)
        true.append(found[tokens[stop]])
    return likeliest, true


def test_teacher_forced_english_agrees_with_llama_cpp(
    smollm2: GGUFFile, smollm2_path: Path
) -> None:
    tokenizer = Tokenizer.from_metadata(smollm2.metadata)
    tokens = tokenizer.encode(ENGLISH.read_text())[: TOKENS + 1]
    assert len(tokens) == TOKENS + 1
    logits = chunked_logits(load_stages(smollm2, 2), tokens[:-1], 512)
    ours = logits.log_softmax(-1)
    with llama_cpp(smollm2_path, context=1024) as peer:
        likeliest, theirs = peer_logprobs(peer, tokens, tokenizer.vocab_size)
    agreed = sum(a == b for a, b in zip(ours.argmax(-1).tolist(), likeliest, strict=True))
    our_loss = -sum(ours[at, token].item() for at, token in enumerate(tokens[1:])) / TOKENS
    their_loss = -sum(theirs) / TOKENS
    ratio = math.exp(our_loss - their_loss)
    assert agreed / TOKENS >= 0.98, f"top-1 agreement {agreed}/{TOKENS}"
    assert abs(ratio - 1) <= 0.005, f"perplexity {math.exp(our_loss):.3f}, ratio {ratio:.5f}"
