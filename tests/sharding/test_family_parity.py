"""The llama family against its reference implementation (Hugging Face transformers) at a tiny
size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from sharding.gguf.reader import GGUFFile
from tests.stages import chunked_logits, load_stages
from tests.tiny_gguf import write_gguf

# Keys and values are rounded to FP16: 2^-11 relative in each, through four layers of values around
# 1.
TOLERANCE = 4 * 2**-11

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def pairs_adjacent(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder a projection's rows from rotating halves (transformers) to adjacent pairs (GGUF)."""
    rows, cols = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, cols)
    return halves.swapaxes(1, 2).reshape(rows, cols)


def to_gguf(
    model: LlamaForCausalLM | MistralForCausalLM, config: LlamaConfig | MistralConfig
) -> GGUFFile:
    """The same weights under GGUF's names, in float32."""
    tensors: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        weight = value.numpy().astype(np.float32)
        _, *where, _ = name.split(".")
        match where:
            case ["layers", layer, *part]:
                own = NAMES[".".join(part)]
                if own in ("attn_q", "attn_k"):
                    kv_heads = config.num_key_value_heads
                    heads = config.num_attention_heads if own == "attn_q" else kv_heads
                    weight = pairs_adjacent(weight, heads)
                gguf_name = f"blk.{layer}.{own}.weight"
            case ["embed_tokens"]:
                gguf_name = "token_embd.weight"
            case ["norm"]:
                gguf_name = "output_norm.weight"
            case _:
                gguf_name = "output.weight"
        tensors[gguf_name] = (weight, weight.shape[::-1], "F32")
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.sliding_window": getattr(config, "sliding_window", 0),
    }
    return GGUFFile.from_bytes(write_gguf(metadata, tensors))


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def check_logits(model: LlamaForCausalLM | MistralForCausalLM, kernels: str = "cpu") -> None:
    """The logits of 50 random tokens, in chunks over two stages."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    tokens = torch.randint(0, 300, (50,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    file = to_gguf(model, model.config)
    found = chunked_logits(load_stages(file, 2, kernels=kernels), tokens, 16)
    assert (found - expected).abs().max() / expected.abs().max() < TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_those_of_transformers(kv_heads: int) -> None:
    torch.manual_seed(kv_heads)
    config = LlamaConfig(**SIZES, num_key_value_heads=kv_heads)
    check_logits(LlamaForCausalLM(config).float().eval())


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_a_sliding_window_equals_that_of_transformers(kernels: str) -> None:
    """The first Mistral 7B has one; in GGUF it is a llama."""
    torch.manual_seed(7)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20)
    check_logits(MistralForCausalLM(config).float().eval(), kernels)
