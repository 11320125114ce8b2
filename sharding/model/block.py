"""The weights of one decoder block, by their GGUF names.

Not here: what is computed with them (`Layers` in `kernels/__init__.py`).
"""

from __future__ import annotations

import torch

from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels
from sharding.kernels.block_weights import (
    BlockWeights,
    DenseWeights,
    ExpertWeights,
    HeadWeights,
)
from sharding.model.arch import ModelShape
from sharding.model.tensors import (
    ATTENTION_POST_NORM,
    DOWN_EXPERTS,
    FFN_POST_NORM,
    GATE_UP_EXPERTS,
    ROUTER,
    gate_up_tensors,
    has_bias,
    qkv_tensors,
)
from sharding.model.weights import load_vector


def load_block(file: GGUFFile, layer: int, shape: ModelShape, kernels: Kernels) -> BlockWeights:
    """Load layer `layer`; `check_tensors` has passed."""
    blk, family = f"blk.{layer}.", shape.family

    def norm(part: str) -> torch.Tensor:
        return load_vector(file, f"{blk}{part}.weight").to(kernels.device)

    return BlockWeights(
        attn_norm_I=norm("attn_norm"),
        qkv=kernels.pack(file, [blk + name for name in qkv_tensors(family)]),
        attn_output=kernels.pack(file, [f"{blk}attn_output.weight"]),
        ffn_norm_I=norm("ffn_norm"),
        feed_forward=_load_feed_forward(file, layer, shape, kernels),
        eps=shape.norm_eps,
        window=shape.window_of(layer),
        heads=_load_heads(file, layer, shape, kernels.device),
        activation=family.activation,
        attn_post_norm_I=norm(ATTENTION_POST_NORM) if family.post_norms else None,
        ffn_post_norm_I=norm(FFN_POST_NORM) if family.post_norms else None,
    )


def _load_feed_forward(
    file: GGUFFile, layer: int, shape: ModelShape, kernels: Kernels
) -> DenseWeights | ExpertWeights:
    blk = f"blk.{layer}."
    if not shape.experts:
        gate_up = [blk + name for name in gate_up_tensors(shape.family)]
        return DenseWeights(
            kernels.pack(file, gate_up), kernels.pack(file, [f"{blk}ffn_down.weight"])
        )
    return ExpertWeights(
        router=kernels.pack(file, [blk + ROUTER]),
        gate_up=kernels.pack_experts(file, [blk + name for name in GATE_UP_EXPERTS]),
        down=kernels.pack_experts(file, [blk + DOWN_EXPERTS]),
        used=shape.experts_used,
    )


def _load_heads(file: GGUFFile, layer: int, shape: ModelShape, device: torch.device) -> HeadWeights:
    blk, family = f"blk.{layer}.attn_", shape.family
    bias_X = q_norm_D = k_norm_D = None
    if has_bias(file, layer):
        parts = [load_vector(file, f"{blk}{part}.bias") for part in "qkv"]
        bias_X = torch.cat(parts).to(device)
    if family.head_norms:
        # Scores are linear in queries, and nothing is added to these after their norm.
        q_norm_D = (load_vector(file, f"{blk}q_norm.weight") * shape.score_scale).to(device)
        k_norm_D = load_vector(file, f"{blk}k_norm.weight").to(device)
    else:
        assert shape.score_scale == 1, "a scale of scores without norms to carry it"
    return HeadWeights(shape.rotation_of(layer), bias_X, q_norm_D, k_norm_D, shape.norm_eps)
