"""The slow twin: every kernel of the contract in plain torch, on weights dequantised to float32.

It is the definition that other kernel sets are tested against, and runs wherever torch runs. It is
not fast and not frugal (4 bytes a weight).

A BLAS picks its way by the shape of a product, and another way sums in another order. A difference
in the last bit of a key may round to another FP16 value in the cache, a thousand times larger, so
shapes are fixed here: products are computed in tiles of `ROW_TILE` tokens, attention in tiles of
`QUERY_TILE` tokens and `KV_BLOCK` slots, padded where there are fewer. How a prompt was cut and
what else is in the batch then only moves a row within a tile, which changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu

from sharding.errors import COMPUTING_FAILED
from sharding.gguf.quants import dequantise
from sharding.kernels.block_weights import PLAIN_HEADS
from sharding.kernels.composed import ComposedHead, ComposedLayers
from sharding.kernels.experts import mix_experts
from sharding.model.sampling import draw, score

if TYPE_CHECKING:
    from sharding.batch import Choice, SamplingParams
    from sharding.gguf.reader import GGUFFile
    from sharding.kernels import Weight
    from sharding.kernels.block_weights import BlockWeights, ExpertWeights, HeadWeights
    from sharding.model.arch import Activation
    from sharding.model.attention import BatchIndex, Rows
    from sharding.model.kv_cache import LayerPages
    from sharding.model.sampling import History


ROW_TILE = 4
QUERY_TILE = 8
KV_BLOCK = 256


@dataclass(frozen=True)
class Float32Weight:
    """A matrix `[rows, cols]` in float32."""

    matrix: torch.Tensor

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.matrix.shape[0]

    @property
    def cols(self) -> int:
        """Inputs."""
        return self.matrix.shape[1]

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""
        return self.matrix.numel() * 4


def _matrix(weight: Weight) -> torch.Tensor:
    assert isinstance(weight, Float32Weight), "a weight of another kernel set"
    return weight.matrix


class ReferenceKernels:
    """See the contract in `sharding/kernels/__init__.py`."""

    name = "reference"
    failures = COMPUTING_FAILED
    device = torch.device("cpu")

    def pack(self, file: GGUFFile, names: Sequence[str]) -> Weight:
        """Dequantise and stack."""
        infos = [file.tensors[name] for name in names]
        stacked = torch.empty(sum(info.rows for info in infos), infos[0].cols)
        row = 0
        for info in infos:
            values = torch.from_numpy(dequantise(info.format, file.raw(info.name)))
            stacked[row : row + info.rows] = values
            row += info.rows
        return Float32Weight(stacked)

    def pack_experts(self, file: GGUFFile, names: Sequence[str]) -> Sequence[Weight]:
        """Dequantise, and stack expert by expert."""
        stacked_ERI = [
            torch.from_numpy(dequantise(file.tensors[name].format, file.raw(name))).unflatten(
                0, (file.tensors[name].shape[2], -1)
            )
            for name in names
        ]
        return [Float32Weight(torch.cat(parts)) for parts in zip(*stacked_ERI, strict=True)]

    def embed(
        self, weight: Weight, ids: Sequence[int], out_TI: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Row lookup."""
        return _matrix(weight)[torch.tensor(ids, dtype=torch.int64)]

    def matmul(
        self, x_TI: torch.Tensor, weight: Weight, residual_TO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Torch's GEMM, tile by tile."""
        matrix_IO = _matrix(weight).t()
        padded = _pad_rows(x_TI, ROW_TILE)
        product = torch.empty(len(padded), matrix_IO.shape[1])
        for first in range(0, len(padded), ROW_TILE):
            tile = slice(first, first + ROW_TILE)
            torch.mm(padded[tile], matrix_IO, out=product[tile])
        y_TO = product[: len(x_TI)]
        return y_TO if residual_TO is None else residual_TO + y_TO

    def rms_norm(
        self,
        x_TI: torch.Tensor,
        scale_I: torch.Tensor,
        eps: float,
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean square is a float32 reduction over one row."""
        y_TI = x_TI * torch.rsqrt(x_TI.square().mean(-1, keepdim=True) + eps) * scale_I
        return y_TI if residual_TI is None else residual_TI + y_TI

    def rotate_and_store(
        self,
        qkv_TX: torch.Tensor,
        index: BatchIndex,
        pages: LayerPages,
        heads: HeadWeights = PLAIN_HEADS,
    ) -> torch.Tensor:
        """Add, norm, rotate, scatter by (page, slot)."""
        if heads.bias_X is not None:
            qkv_TX = qkv_TX + heads.bias_X
        qkv_THD = qkv_TX.unflatten(1, (-1, pages.head_dim))
        groups = pages.kv_heads
        q_THD, k_TGD, v_TGD = qkv_THD.split([qkv_THD.shape[1] - 2 * groups, groups, groups], dim=1)
        if heads.q_norm_D is not None and heads.k_norm_D is not None:
            q_THD = self.rms_norm(q_THD, heads.q_norm_D, heads.eps)
            k_TGD = self.rms_norm(k_TGD, heads.k_norm_D, heads.eps)
        turned_TGD = _rotate(k_TGD, index, heads.rotation)
        pages.k_PGDS[index.page_T, :, :, index.slot_T] = turned_TGD.half()
        pages.v_PGSD[index.page_T, :, index.slot_T] = v_TGD.half()
        return _rotate(q_THD, index, heads.rotation).flatten(1)

    def attention(
        self, q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int = 0
    ) -> torch.Tensor:
        """Segment by segment: a request never sees another's slots."""
        q_THD = q_TX.unflatten(1, (-1, pages.head_dim))
        attended = torch.empty_like(q_THD)
        for rows in index.rows:
            part = slice(rows.first, rows.stop)
            attended[part] = _attend(q_THD[part], rows, pages, window)
        return attended.flatten(1)

    def gated(self, gate_up_T2F: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """The first half of the columns is the gate."""
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return (silu(gate) if activation == "silu" else _gelu(gate)) * up

    def mix_experts(
        self,
        x_TI: torch.Tensor,
        experts: ExpertWeights,
        activation: Activation = "silu",
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Step by step."""
        return mix_experts(self, x_TI, experts, activation, residual_TI)

    def draw(
        self,
        logits_V: torch.Tensor,
        params: SamplingParams,
        position: int,
        drawn: int,
        history: History | None,
    ) -> int:
        """Torch, token by token of the definition."""
        return draw(logits_V, params, position, drawn, history)

    def score(
        self, logits_TV: torch.Tensor, targets: Sequence[int], alternatives: int
    ) -> list[Choice]:
        """Torch, slab by slab."""
        return score(logits_TV, targets, alternatives)

    def works(self) -> bool:
        """A processor that fails takes the process with it."""
        return True

    def layers(
        self, weights: Sequence[BlockWeights], pages: Sequence[LayerPages]
    ) -> ComposedLayers:
        """Step by step."""
        return ComposedLayers(self, weights, pages)

    def head(self, norm_I: torch.Tensor, eps: float, weight: Weight) -> ComposedHead:
        """Step by step."""
        return ComposedHead(self, norm_I, eps, weight)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """`x (1 + tanh(z)) / 2` with z = sqrt(2 / pi) (x + 0.044715 x^3), which is `x sigmoid(2 z)`:
    torch's own loses what is small to the sum."""
    slope = 2 * math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (x.square() * (0.044715 * slope) + slope))


def _rotate(x_THD: torch.Tensor, index: BatchIndex, rotation: int) -> torch.Tensor:
    """Views the rotating elements as pairs, whichever of them belong together."""
    rope = index.rope
    turning = 2 * rope.turning
    cos, sin = index.cos_NTR[rotation, :, None], index.sin_NTR[rotation, :, None]
    a, b = x_THD[..., :turning].unflatten(-1, rope.pair_shape).unbind(rope.pair_axis)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=rope.pair_axis)
    return torch.cat((turned.flatten(-2), x_THD[..., turning:]), dim=-1)


def _pad_rows(x: torch.Tensor, tile: int) -> torch.Tensor:
    """Zero rows at the end, so that the first dimension is whole tiles."""
    missing = -len(x) % tile
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x.contiguous()


def _attend(q_THD: torch.Tensor, rows: Rows, pages: LayerPages, window: int) -> torch.Tensor:
    """One segment's attention, tile by tile; the heads that share a kv head read it once."""
    tokens, heads, dim = q_THD.shape
    shared = heads // pages.kv_heads
    padded = _pad_rows(q_THD * dim**-0.5, QUERY_TILE)
    stop = rows.position + tokens
    attended = torch.empty_like(padded)
    for first in range(0, tokens, QUERY_TILE):
        tile = slice(first, first + QUERY_TILE)
        # [T, G * shared, D] -> [G, T * shared, D]
        q_GtD = padded[tile].unflatten(1, (-1, shared)).transpose(0, 1).flatten(1, 2)
        last_T = (torch.arange(first, first + QUERY_TILE) + rows.position).clamp(max=stop - 1)
        last_t = last_T.repeat_interleave(shared)
        first_t = (last_t - window + 1).clamp(min=0) if window else torch.zeros_like(last_t)
        seen = (first_t[:, None], last_t[:, None])
        mixed_GtD = _attend_tile(q_GtD, seen, rows.pages, pages)
        attended[tile] = mixed_GtD.unflatten(1, (-1, shared)).transpose(0, 1).flatten(1, 2)
    return attended[:tokens]


def _attend_tile(
    q_GtD: torch.Tensor,
    seen: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    pages: LayerPages,
) -> torch.Tensor:
    """Queries over the slots from the first to the last that each sees (`seen`, both included),
    block by block with an online softmax.

    A block that a query does not see changes nothing for it, bit for bit: weights of 0, a factor of
    1. Milakov and Gimelshein, 2018.
    """
    first_t1, last_t1 = seen
    length = int(last_t1[-1]) + 1
    most = torch.full((*q_GtD.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(most)
    mixed = torch.zeros_like(q_GtD)
    for start in range(int(first_t1[0]) // KV_BLOCK * KV_BLOCK, length, KV_BLOCK):
        k_GDN, v_GND = pages.gather(table, start, KV_BLOCK, length)
        slots = torch.arange(start, start + KV_BLOCK)
        hidden_tN = (slots > last_t1) | (slots < first_t1)
        scores = (q_GtD @ k_GDN).masked_fill_(hidden_tN, -torch.inf)
        higher = torch.maximum(most, scores.amax(-1, keepdim=True))
        # A query that has seen nothing yet has no maximum to subtract.
        shift = higher.masked_fill(hidden_tN.all(-1, keepdim=True) & (total == 0), 0.0)
        weights = torch.exp(scores - shift)
        shrink = torch.exp(most - shift)
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed = mixed * shrink + weights @ v_GND
        most = higher
    return mixed / total
