"""Model families against their reference implementations (Hugging Face transformers) at a tiny
size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def pairs_adjacent(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder a projection's rows from rotating halves (transformers) to adjacent pairs (GGUF)."""
    rows, cols = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, cols)
    return halves.swapaxes(1, 2).reshape(rows, cols)


def expert_tensors(layer: str, kind: str, weight: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Experts' gates and what they let through, stacked by transformers, as two tensors."""
    parts = {"ffn_down": weight}
    if kind == "gate_up_proj":
        parts = dict(zip(("ffn_gate", "ffn_up"), np.split(weight, 2, axis=1), strict=True))
    return {
        f"blk.{layer}.{name}_exps.weight": (np.ascontiguousarray(part), part.shape[::-1], "F32")
        for name, part in parts.items()
    }


def to_gguf(
    model: torch.nn.Module, family: str, keys: dict[str, Any], more: dict[str, Any]
) -> GGUFFile:
    """The same weights under GGUF's names, in float32, as llama.cpp's converter changes them."""
    config: Any = model.config
    tensors: dict[str, Any] = dict(more)
    for name, value in model.state_dict().items():
        weight = value.numpy().astype(np.float32)
        _, *where, kind = name.split(".")
        if family.startswith("gemma") and "norm" in name:
            weight = weight + 1  # theirs are kept as what they differ from 1 by
        match where:
            case ["layers", layer, "mlp", "experts"]:
                tensors |= expert_tensors(layer, kind, weight)
                continue
            case ["layers", layer, *part]:
                names = NAMES | (GEMMA3_NAMES if family == "gemma3" else {})
                own = names[".".join(part)]
                if own in ("attn_q", "attn_k") and family == "llama":
                    kv_heads = config.num_key_value_heads
                    heads = config.num_attention_heads if own == "attn_q" else kv_heads
                    weight = pairs_adjacent(weight, heads)
                gguf_name = f"blk.{layer}.{own}.{kind}"
            case ["embed_tokens"]:
                gguf_name = "token_embd.weight"
            case ["norm"]:
                gguf_name = "output_norm.weight"
            case _ if config.tie_word_embeddings:
                continue
            case _:
                gguf_name = "output.weight"
        tensors[gguf_name] = (weight, weight.shape[::-1], "F32")
    own_keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,
    }
    metadata = {f"{family}.{key}": value for key, value in (own_keys | keys).items()}
    return GGUFFile.from_bytes(write_gguf({"general.architecture": family} | metadata, tensors))


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


def check_logits(
    model: torch.nn.Module,
    family: str = "llama",
    kernels: str = "cpu",
    keys: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """The logits of 50 random tokens, in chunks over two stages."""
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        mean = float(parameter.dim() == 1 and "norm" in name and not family.startswith("gemma"))
        torch.nn.init.normal_(parameter, mean=mean, std=0.15)
    tokens = torch.randint(0, 300, (50,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    file = to_gguf(model, family, keys or {}, more or {})
    found = chunked_logits(load_stages(file, 2, kernels=kernels), tokens, 16)
    assert (found - expected).abs().max() / expected.abs().max() < TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_those_of_transformers(kv_heads: int) -> None:
    torch.manual_seed(kv_heads)
    check_logits(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=kv_heads)))


on_both_sets = pytest.mark.parametrize("kernels", ["cpu", "reference"])


@on_both_sets
def test_a_sliding_window_equals_that_of_transformers(kernels: str) -> None:
    """The first Mistral 7B has one; in GGUF it is a llama."""
    torch.manual_seed(7)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20)
    model = MistralForCausalLM(config)
    check_logits(model, kernels=kernels, keys={"attention.sliding_window": 20})


@on_both_sets
def test_qwen2_equals_that_of_transformers(kernels: str) -> None:
    torch.manual_seed(8)
    config = Qwen2Config(**SIZES, num_key_value_heads=2)
    check_logits(Qwen2ForCausalLM(config), "qwen2", kernels)


@on_both_sets
def test_qwen3_equals_that_of_transformers(kernels: str) -> None:
    torch.manual_seed(9)
    config = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32)
    sizes = {"attention.key_length": 32, "attention.value_length": 32}
    check_logits(Qwen3ForCausalLM(config), "qwen3", kernels, sizes)


def choices(model: torch.nn.Module, used: int) -> list[float]:
    """Collects, while a model runs, how far apart the logits of the last expert that a token takes
    and of the first that it does not take are, relative to the largest."""
    gaps: list[float] = []

    def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        router = module.get_parameter("weight")
        logits_TE = torch.nn.functional.linear(args[0].reshape(-1, router.shape[1]), router)
        ranked_TE = logits_TE.sort(dim=-1, descending=True).values
        apart_T = ranked_TE[:, used - 1] - ranked_TE[:, used]
        gaps.append((apart_T / logits_TE.abs().amax(-1)).min().item())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(look)
    return gaps


@on_both_sets
def test_qwen3moe_equals_that_of_transformers(kernels: str) -> None:
    torch.manual_seed(23)
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
    config = Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=32, norm_topk_prob=True, **experts
    )
    model = Qwen3MoeForCausalLM(config)
    keys = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 48,
    }
    gaps = choices(model, used=3)
    check_logits(model, "qwen3moe", kernels, keys)
    assert min(gaps) > TOLERANCE, "a choice that rounding could turn: take another seed"


@on_both_sets
def test_mixtral_equals_that_of_transformers(kernels: str) -> None:
    """In GGUF it is a llama."""
    torch.manual_seed(58)
    config = MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2
    )
    model = MixtralForCausalLM(config)
    gaps = choices(model, used=2)
    keys = {"rope.freq_base": 1e6, "expert_count": 6, "expert_used_count": 2}
    check_logits(model, "llama", kernels, keys)
    assert min(gaps) > TOLERANCE, "a choice that rounding could turn: take another seed"


@on_both_sets
@pytest.mark.parametrize("factor", [4.0, 16.0])
def test_yarn_equals_that_of_transformers(factor: float, kernels: str) -> None:
    """Files for contexts beyond what the model was trained on ask for it."""
    torch.manual_seed(10)
    trained = int(256 / factor)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        "rope_theta": 10000.0,
    }
    config = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, rope_parameters=scaling)
    keys = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": trained,
    }
    check_logits(Qwen3ForCausalLM(config), "qwen3", kernels, keys)


@on_both_sets
def test_phi3_equals_that_of_transformers(kernels: str) -> None:
    torch.manual_seed(14)
    config = Phi3Config(
        **SIZES, num_key_value_heads=2, sliding_window=20, pad_token_id=0, eos_token_id=1
    )
    keys = {"attention.sliding_window": 20}
    check_logits(Phi3ForCausalLM(config), "phi3", kernels, keys)


@pytest.mark.parametrize("trained", [16, 256])
def test_longrope_equals_that_of_transformers(trained: int) -> None:
    """Other factors for contexts beyond what it was first trained for; the test's has 50 tokens,
    and 256 may come."""
    torch.manual_seed(15)
    long, short = [1.0 + pair for pair in range(8)], [1.0 + pair / 8 for pair in range(8)]
    scaling = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "attention_factor": 1.2,
        "original_max_position_embeddings": trained,
        "rope_theta": 10000.0,
    }
    config = Phi3Config(
        **SIZES,
        num_key_value_heads=2,
        original_max_position_embeddings=trained,
        rope_parameters=scaling,
        pad_token_id=0,
        eos_token_id=1,
    )
    keys = {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": 1.2,
        "rope.scaling.original_context_length": trained,
    }
    factors = {
        f"rope_factors_{name}.weight": (np.array(values, np.float32), (8,), "F32")
        for name, values in (("long", long), ("short", short))
    }
    check_logits(Phi3ForCausalLM(config), "phi3", keys=keys, more=factors)


@on_both_sets
def test_gemma_equals_that_of_transformers(kernels: str) -> None:
    torch.manual_seed(11)
    config = GemmaConfig(
        **SIZES | {"tie_word_embeddings": True}, num_key_value_heads=1, head_dim=32
    )
    sizes = {"attention.key_length": 32, "attention.value_length": 32}
    check_logits(GemmaForCausalLM(config), "gemma", kernels, sizes)


@on_both_sets
def test_gemma3_equals_that_of_transformers(kernels: str) -> None:
    """Of eight layers the sixth sees everything, by another rotation, whose positions are scaled in
    the larger models."""
    torch.manual_seed(12)
    rotations = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 8, "tie_word_embeddings": True},
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=20,
        rope_parameters=rotations,
    )
    keys = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 20,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    check_logits(Gemma3ForCausalLM(config), "gemma3", kernels, keys)


def test_gemma3_of_27b_scales_scores_by_its_hidden_size() -> None:
    """As its 62 layers tell."""
    torch.manual_seed(13)
    config = Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 62, "tie_word_embeddings": True},
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=16,
        sliding_window=20,
    )
    keys = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 20,
        "rope.freq_base": 1e6,
    }
    check_logits(Gemma3ForCausalLM(config), "gemma3", keys=keys)
