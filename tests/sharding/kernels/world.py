"""Small matrices, pages and batches for the kernels' tests. Not here: what is expected of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sharding.batch import PAGE_SLOTS, Segment
from sharding.gguf.reader import GGUFFile
from sharding.kernels.block_weights import HeadWeights
from sharding.model.arch import Pairs
from sharding.model.attention import BatchIndex, build_index
from sharding.model.kv_cache import LayerPages
from sharding.model.rope import Rope
from tests.sharding.kernels.bounds import ARITHMETIC, BY_NAME
from tests.tiny_gguf import write_gguf

FORMAT_NAMES = tuple(ARITHMETIC)
FLOATS = ("F32", "F16", "BF16")


def random_raw(name: str, rows: int, cols: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows of random weights of about 1, uint8 `[rows, row_bytes]`.

    Quantised ones are random bytes but for their scales, among which are negative, zero and
    subnormal ones.
    """
    rng = np.random.default_rng(seed)
    if name in FLOATS:
        values = rng.standard_normal((rows, cols), np.float32)
        if name == "F32":
            return values.view(np.uint8)
        return (values.astype(np.float16) if name == "F16" else _upper_halves(values)).view(
            np.uint8
        )
    format, how = BY_NAME[name], ARITHMETIC[name]
    units = rng.integers(
        0, 256, (rows * cols // format.block_elements, format.block_bytes), np.uint8
    )
    for at in (how.d_at, how.m_at):
        if at is not None:
            scales = rng.normal(0, 1 / (16 * how.scale_most), (len(units), 1)).astype(np.float16)
            scales[rng.random(len(units)) < 0.05] = rng.choice([0.0, 1e-7, -3e-6])
            units[:, at : at + 2] = scales.view(np.uint8)
    return units.reshape(rows, format.row_bytes(cols))


def _upper_halves(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def file_of(**tensors: tuple[str, NDArray[np.uint8]]) -> GGUFFile:
    """A GGUF file of these (format, rows of bytes)."""
    table = {}
    for name, (format_name, raw) in tensors.items():
        format = BY_NAME[format_name]
        cols = raw.shape[1] // format.block_bytes * format.block_elements
        table[name] = (raw, (cols, len(raw)), format_name)
    return GGUFFile.from_bytes(write_gguf({}, table))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Activations."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where a NaN is equal to a NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads, head dim; `rope_dims` of it turn, in the pairs of `pairs`."""

    heads: int
    kv_heads: int
    dim: int
    rope_dims: int = 2
    pairs: Pairs = "adjacent"


def index_of(
    heads: Heads, runs: Sequence[tuple[int, int, int]], slots: int, rotations: int = 1
) -> BatchIndex:
    """A batch of runs (request, first position, tokens). Every request has pages for so many slots,
    those of neighbours lying criss-cross."""
    requests = 1 + max(request for request, *_ in runs)
    count = -(-slots // PAGE_SLOTS)
    tables = {r: torch.arange(count).flip(0) * requests + r for r in range(requests)}
    segments = [Segment(request, start, [0] * tokens) for request, start, tokens in runs]
    freqs_NR = torch.linspace(1, 0.01, rotations * heads.rope_dims // 2, dtype=torch.float64)
    gains = tuple(1 + number / 8 for number in range(rotations))
    return build_index(segments, tables, Rope(freqs_NR.view(rotations, -1), gains, heads.pairs))


def own_weights(
    heads: Heads, bias: bool, norms: bool, device: torch.device | str = "cpu"
) -> HeadWeights:
    """A bias, norms of about 1, and the second rotation."""
    features = (heads.heads + 2 * heads.kv_heads) * heads.dim
    bias_X = normal(features, seed=31).to(device) if bias else None
    if not norms:
        return HeadWeights(1, bias_X)
    q_norm_D, k_norm_D = (1 + normal(heads.dim, seed=seed).to(device) / 8 for seed in (32, 33))
    return HeadWeights(1, bias_X, q_norm_D, k_norm_D, 1e-6)


def random_pages(heads: Heads, slots: int, requests: int = 1, seed: int = 2) -> LayerPages:
    """Pages full of keys and values of about 1, for requests of so many slots."""
    pages = -(-slots // PAGE_SLOTS) * requests
    k_PGDS = normal(pages, heads.kv_heads, heads.dim, PAGE_SLOTS, seed=seed).half()
    v_PGSD = normal(pages, heads.kv_heads, PAGE_SLOTS, heads.dim, seed=seed + 1).half()
    return LayerPages(k_PGDS, v_PGSD)
