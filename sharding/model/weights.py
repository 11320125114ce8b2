"""How a stage loads tensors that are no decoder block's.

Not here: quantisation (`gguf/quants.py`) and resident layout (`kernels/`).
"""

from __future__ import annotations

import numpy as np
import torch

from sharding.gguf.quants import dequantise
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels, Weight
from sharding.model.tensors import EMBEDDING, OUTPUT


def load_vector(file: GGUFFile, name: str) -> torch.Tensor:
    """A norm or factor tensor, float32 `[N]`."""
    info = file.tensors[name]
    return torch.from_numpy(np.array(dequantise(info.format, file.raw(name)))).reshape(-1)


def load_head(file: GGUFFile, kernels: Kernels, embedding: Weight | None) -> Weight:
    """The output head; a tied model's is its embedding, shared if the same stage has it."""
    if OUTPUT in file.tensors:
        return kernels.pack(file, [OUTPUT])
    return kernels.pack(file, [EMBEDDING]) if embedding is None else embedding
