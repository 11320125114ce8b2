"""How a stage loads tensors that are no decoder block's.

Not here: quantisation (`gguf/quants.py`) and resident layout (`kernels/`).
"""

from __future__ import annotations

import numpy as np
import torch

from sharding.gguf.quants import dequantise
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels, Weight
from sharding.model.arch import ModelShape
from sharding.model.tensors import EMBEDDING, LONG_FACTORS, OUTPUT, ROPE_FACTORS, SHORT_FACTORS


def load_vector(file: GGUFFile, name: str) -> torch.Tensor:
    """A norm or factor tensor, float32 `[N]`."""
    info = file.tensors[name]
    return torch.from_numpy(np.array(dequantise(info.format, file.raw(name)))).reshape(-1)


def load_factors(file: GGUFFile, shape: ModelShape, context: int) -> torch.Tensor | None:
    """What divides the frequencies of rotary pairs, float32 `[R]`, for requests of up to so many
    tokens; None for a model without."""
    own = LONG_FACTORS if context > shape.rotations[0].trained else SHORT_FACTORS
    found = next((name for name in (ROPE_FACTORS, own) if name in file.tensors), None)
    return None if found is None else load_vector(file, found)


def load_head(file: GGUFFile, kernels: Kernels, embedding: Weight | None) -> Weight:
    """The output head; a tied model's is its embedding, shared if the same stage has it."""
    if OUTPUT in file.tensors:
        return kernels.pack(file, [OUTPUT])
    return kernels.pack(file, [EMBEDDING]) if embedding is None else embedding
