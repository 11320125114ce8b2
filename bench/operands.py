"""What kernels are measured on: packed weights and filled KV pages, in enough copies to be cold.

Not here: what is measured (`kernels.py`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from sharding.batch import PAGE_SLOTS, Segment
from sharding.gguf.quants import FORMATS
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels, Weight
from sharding.model.arch import read_shape
from sharding.model.attention import BatchIndex, build_index
from sharding.model.kv_cache import LayerPages, PageStore
from sharding.model.rope import rope_of
from tests.tiny_gguf import random_weight, write_gguf

Shape = tuple[int, int]
"""Rows and columns of a matrix."""

Heads = tuple[int, int, int]
"""Query heads, kv heads, head dim."""

COMPUTED = tuple(format.name for format in FORMATS.values() if format.computed)
"""The names of all formats that kernels compute with."""

_COLD_BYTES = 200_000_000
_DRAWN_ROWS = 64


def copies_for(n_bytes: int) -> int:
    """Copies that make more than 200 MB together, several times a last-level cache."""
    return _COLD_BYTES // n_bytes + 1


def raw_rows(format: str, shape: Shape) -> NDArray[np.uint8]:
    """A matrix in a file's bytes, `[rows, row_bytes]`: few random rows, over and over."""
    rows, cols = shape
    drawn, _, _ = random_weight(np.random.default_rng(0), (cols, _DRAWN_ROWS), format)
    some = np.frombuffer(bytes(drawn), np.uint8).reshape(_DRAWN_ROWS, -1)
    return np.resize(some, (rows, some.shape[1]))


def raw_file(format: str, shape: Shape) -> GGUFFile:
    """A file with one matrix, `w`."""
    rows, cols = shape
    return GGUFFile.from_bytes(
        write_gguf({}, {"w": (raw_rows(format, shape), (cols, rows), format)})
    )


@lru_cache(maxsize=2)
def packed_copies(kernels: Kernels, format: str, shape: Shape) -> tuple[Weight, ...]:
    """Copies of a packed matrix. The last two answers are kept: a format and Q4_1 beside it."""
    file = raw_file(format, shape)
    copies = range(copies_for(file.tensors["w"].n_bytes))
    return tuple(kernels.pack(file, ["w"]) for _ in copies)


def filled_layers(count: int, heads: Heads, slots: int) -> list[LayerPages]:
    """KV pages of so many layers, with random values from 0.5 to 1 of either sign."""
    _, groups, dim = heads
    layers = PageStore([_pages(slots)] * count, groups, dim).layers
    rng = np.random.default_rng(0)
    for tensor in (tensor for layer in layers for tensor in (layer.k_PGDS, layer.v_PGSD)):
        bits = rng.integers(0, 1 << 16, tuple(tensor.shape), np.uint16)
        bits &= 0x83FF
        bits |= 0x3800
        tensor.copy_(torch.from_numpy(bits.view(np.float16)))
    return layers


def one_request(heads: Heads, depth: int, tokens: int) -> BatchIndex:
    """A batch of one request: so many tokens, after `depth` that are in its pages already."""
    queries, groups, dim = heads
    shape = read_shape(
        {
            "general.architecture": "llama",
            "llama.block_count": 1,
            "llama.context_length": depth + tokens,
            "llama.embedding_length": queries * dim,
            "llama.feed_forward_length": queries * dim,
            "llama.attention.head_count": queries,
            "llama.attention.head_count_kv": groups,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.vocab_size": 32000,
        }
    )
    # Not in order: what a page table looks like after a day of requests.
    table = torch.from_numpy(np.random.default_rng(0).permutation(_pages(depth + tokens)))
    segment = Segment(1, depth, [0] * tokens)
    return build_index([segment], {1: table}, rope_of(shape, None))


def _pages(slots: int) -> int:
    return -(-slots // PAGE_SLOTS)
