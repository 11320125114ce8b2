"""One decoder block of the llama family: norms, attention, gated feed-forward, two residuals.

T tokens, I hidden size, H query heads, G kv heads, D head dim, F feed-forward width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels, Weight
from sharding.model.arch import ModelShape
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages
from sharding.model.weights import load_vector


@dataclass(frozen=True)
class Block:
    """A block's weights. Matrices with the same input are one weight: one call reads it once."""

    attn_norm_I: torch.Tensor
    qkv: Weight
    attn_output: Weight
    ffn_norm_I: torch.Tensor
    gate_up: Weight
    ffn_down: Weight

    @property
    def n_bytes(self) -> int:
        """Resident bytes of the weights."""
        norms = (self.attn_norm_I.numel() + self.ffn_norm_I.numel()) * 4
        matrices = (self.qkv, self.attn_output, self.gate_up, self.ffn_down)
        return norms + sum(weight.n_bytes for weight in matrices)


def load_block(file: GGUFFile, layer: int, kernels: Kernels) -> Block:
    """Load layer `layer`; `check_tensors` has passed."""
    blk = f"blk.{layer}."
    return Block(
        attn_norm_I=load_vector(file, blk + "attn_norm.weight"),
        qkv=kernels.pack(file, [blk + f"attn_{part}.weight" for part in "qkv"]),
        attn_output=kernels.pack(file, [blk + "attn_output.weight"]),
        ffn_norm_I=load_vector(file, blk + "ffn_norm.weight"),
        gate_up=kernels.pack(file, [blk + "ffn_gate.weight", blk + "ffn_up.weight"]),
        ffn_down=kernels.pack(file, [blk + "ffn_down.weight"]),
    )


@dataclass(frozen=True)
class Decoder:
    """Runs blocks of one shape with one kernel set."""

    shape: ModelShape
    kernels: Kernels

    def run(
        self, block: Block, x_TI: torch.Tensor, index: BatchIndex, pages: LayerPages
    ) -> torch.Tensor:
        """The block's output `[T, I]`; writes the batch's keys and values into `pages`."""
        kernels, eps = self.kernels, self.shape.norm_eps
        normed = kernels.rms_norm(x_TI, block.attn_norm_I, eps)
        x_TI = x_TI + kernels.matmul(self._attend(block, normed, index, pages), block.attn_output)
        normed = kernels.rms_norm(x_TI, block.ffn_norm_I, eps)
        gated = kernels.gated_silu(kernels.matmul(normed, block.gate_up))
        return x_TI + kernels.matmul(gated, block.ffn_down)

    def _attend(
        self, block: Block, normed_TI: torch.Tensor, index: BatchIndex, pages: LayerPages
    ) -> torch.Tensor:
        shape, kernels = self.shape, self.kernels
        qkv = kernels.matmul(normed_TI, block.qkv)
        widths = [shape.q_features, shape.kv_features, shape.kv_features]
        q, k, v = torch.split(qkv, widths, dim=-1)
        heads = (-1, shape.head_dim)
        q_THD = kernels.rotate(q.unflatten(-1, heads), index)
        k_TGD = kernels.rotate(k.unflatten(-1, heads), index)
        kernels.write_kv(k_TGD, v.unflatten(-1, heads), index, pages)
        return kernels.attention(q_THD, index, pages)
