"""Model families against llama.cpp, at a tiny size: the same reading of a file's keys and tensors,
and the same log-probabilities after it.

Not here: arithmetic to the last digit (`test_family_parity.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.gguf.reader import GGUFFile
from tests.peer import llama_cpp
from tests.stages import chunked_logits, load_stages
from tests.tiny_gguf import tiny_model

pytestmark = pytest.mark.peer

# Both round keys and values to FP16, llama.cpp what it mixes them by as well: 2^-11 each, through
# eight layers, of logits that reach 4.
TOLERANCE = 8 * 2**-11 * 4

YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
GEMMA3 = {
    "attention.sliding_window": 20,
    "rope.freq_base": 1e6,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
}
LONGROPE = {"rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 64}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {f"rope.scaling.{key}": value for key, value in YARN.items()}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3moe", {}),
    ("llama", {"expert_count": 8, "expert_used_count": 3}),
    ("qwen3", {f"rope.scaling.{key}": value for key, value in YARN.items()}),
    ("phi3", {"rope.dimension_count": 8}),
    ("phi3", LONGROPE),
    ("phi3", LONGROPE | {"rope.scaling.original_context_length": 256}),
    ("gemma", {}),
    ("gemma3", GEMMA3),
    ("gemma3", GEMMA3 | {"rope.freq_base_swa": 5000.0, "attention.sliding_window_pattern": 3}),
]


@pytest.mark.parametrize(("family", "keys"), CASES, ids=lambda case: str(case)[:30])
def test_log_probabilities_are_those_of_llama_cpp(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Every token's, after a first token and after more than a window."""
    named = {f"{family}.{key}": value for key, value in keys.items()}
    # llama.cpp reads no other there.
    head_dim = None if family in ("qwen2", "phi3") else 32
    path = tmp_path / "tiny.gguf"
    mixes = family == "qwen3moe" or "expert_count" in keys
    path.write_bytes(
        tiny_model(
            family=family,
            experts=8 if mixes else 0,
            layers=8,
            quant="F32",
            head_dim=head_dim,
            longrope="rope.scaling.attn_factor" in keys,
            extra_metadata=named,
        )
    )
    tokens = torch.randint(3, 200, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    with GGUFFile.open(path) as file:
        logprobs = chunked_logits(load_stages(file, 2), tokens, 512).log_softmax(-1)
    with llama_cpp(path, context=256, threads=1) as peer:
        for count in (1, 40, 70):
            found = peer.next_logprobs(tokens[:count], logprobs.shape[1], drawn_id=67)
            assert len(found) == logprobs.shape[1]
            ours = logprobs[count - 1, list(found)]
            apart = (ours - torch.tensor(list(found.values()))).abs().max()
            assert apart < TOLERANCE, count
