"""The weights of one decoder block of the llama family, by their GGUF names.

Not here: what is computed with them (`Layers` in `kernels/__init__.py`).
"""

from __future__ import annotations

from sharding.gguf.reader import GGUFFile
from sharding.kernels import BlockWeights, Kernels
from sharding.model.arch import ModelShape
from sharding.model.weights import load_vector


def load_block(file: GGUFFile, layer: int, shape: ModelShape, kernels: Kernels) -> BlockWeights:
    """Load layer `layer`; `check_tensors` has passed."""
    blk = f"blk.{layer}."
    return BlockWeights(
        attn_norm_I=load_vector(file, blk + "attn_norm.weight").to(kernels.device),
        qkv=kernels.pack(file, [blk + f"attn_{part}.weight" for part in "qkv"]),
        attn_output=kernels.pack(file, [blk + "attn_output.weight"]),
        ffn_norm_I=load_vector(file, blk + "ffn_norm.weight").to(kernels.device),
        gate_up=kernels.pack(file, [blk + "ffn_gate.weight", blk + "ffn_up.weight"]),
        ffn_down=kernels.pack(file, [blk + "ffn_down.weight"]),
        window=shape.window,
        eps=shape.norm_eps,
    )
