"""Splits GGUF's groups into the planes of `planes.py`, in plain torch on the device that will hold
them: once, at load. Exact: not a bit of a scale or an integer is lost.

    O rows, U units of a row, G groups, I columns

Where a format keeps what: ggml's `ggml-common.h`. Not here: the arithmetic (`triton_matmul.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.gguf.reader import GGUFFile, TensorInfo
from sharding.kernels.planes import PLANES, RUN, TILE, Planes

SLAB_BYTES = 1 << 26
"""Bytes of a file that are split at a time: a few times as much is needed beside the result."""

IQ4_CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the integers of IQ4_NL and IQ4_XS stand for: `kvalues_iq4nl` in ggml."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """Rows `[first, first + rows)` of a weight, all of one format, as planes.

    `headroom`: a power of two that brings every weight of the part below 2^14, for FP16.
    A plane that the format does not have is an empty tensor.
    """

    planes: Planes
    first: int
    rows: int
    low: Tensor
    high: Tensor
    scales: Tensor
    units: Tensor
    headroom: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The planes in the order that kernels take them."""
        return self.low, self.high, self.scales, self.units

    @property
    def cols(self) -> int:
        """Columns as stored, with the padding."""
        if not self.planes.quantised:
            return self.low.shape[1]
        return self.low.shape[1] // TILE * 32 // self.planes.low_bits


@dataclass(frozen=True)
class PlanesWeight:
    """A matrix `[rows, cols]` as parts, one for each run of tensors of one format."""

    rows: int
    cols: int
    parts: tuple[Part, ...]

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""
        return sum(plane.nbytes for part in self.parts for plane in part.tensors)


def pack(file: GGUFFile, infos: Sequence[TensorInfo], device: torch.device) -> PlanesWeight:
    """Tensors of equal columns, stacked by rows."""
    parts: list[Part] = []
    first = 0
    for run in _runs(infos):
        parts.append(_part(run[0], first, [file.raw(info.name) for info in run], device))
        first += parts[-1].rows
    return PlanesWeight(first, infos[0].cols, tuple(parts))


def _runs(infos: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    runs: list[list[TensorInfo]] = []
    for info in infos:
        if runs and runs[-1][-1].format == info.format:
            runs[-1].append(info)
        else:
            runs.append([info])
    return runs


def _part(
    info: TensorInfo, first: int, raws: Sequence[NDArray[np.uint8]], device: torch.device
) -> Part:
    planes, name = PLANES[info.format.name], info.format.name
    found: list[dict[str, Tensor]] = []
    headroom = 2.0**-126
    for slab in _slabs(raws):
        bytes_OB = torch.from_numpy(slab).to(device)
        if planes.quantised:
            split = _SPLITTERS[name](bytes_OB.unflatten(1, (-1, info.format.block_bytes)))
            headroom = max(headroom, _headroom(planes, split))
            found.append(_together(planes, split, info.cols))
        else:
            values_OI = bytes_OB.contiguous().view(_FLOATS[name])
            room = planes.padded(info.cols) - info.cols
            found.append({"low": torch.nn.functional.pad(values_OI, (0, room))})
            headroom = max(headroom, _power(float(values_OI.abs().nan_to_num(0, 0, 0).max())))
    empty = torch.empty(0, dtype=torch.int8, device=device)
    stacked = {
        key: torch.cat([slab[key] for slab in found], dim=int(key in ("scales", "units")))
        for key in found[0]
    }
    low = stacked["low"]
    high, scales, units = (stacked.get(key, empty) for key in ("high", "scales", "units"))
    rows = sum(len(raw) for raw in raws)
    return Part(planes, first, rows, low, high, scales, units, headroom)


def _slabs(raws: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Copies of whole tiles' rows, over the borders of tensors; the last may lack rows."""
    rows = max(1, SLAB_BYTES // raws[0].shape[1] // TILE) * TILE
    left = raws[0][:0]
    for raw in raws:
        for first in range(0, len(raw), rows):
            slab = np.concatenate((left, raw[first : first + rows]))
            whole = len(slab) // TILE * TILE
            left = slab[whole:]
            if whole:
                yield slab[:whole]
    if len(left):
        yield left


def _headroom(planes: Planes, split: dict[str, Tensor]) -> float:
    largest = planes.largest * _largest(split, "d", "scales")
    if planes.minimum:
        largest += _largest(split, "m", "minima")
    return _power(largest)


def _power(largest: float) -> float:
    """Brings `largest` below 2^14. It and its inverse are float32s."""
    return 2.0 ** max(-126, min(126, math.frexp(largest)[1] - 14))


def _largest(found: dict[str, Tensor], fp16: str, integers: str) -> float:
    """Bound on the product of an FP16 scale and its integers."""
    unit = found[fp16].float().abs().nan_to_num(0.0, 0.0, 0.0)
    return float(unit.max()) * (
        float(found[integers].short().abs().max()) if integers in found else 1.0
    )


def _together(planes: Planes, split: dict[str, Tensor], cols: int) -> dict[str, Tensor]:
    """What the kernels read, of what a splitter found."""
    padded = planes.padded(cols)
    q_OI = _padded(split["q"].flatten(1) ^ planes.offset, padded)
    found = {"low": _in_runs(q_OI & ((1 << planes.low_bits) - 1), planes.low_bits)}
    if planes.high_bits:
        found["high"] = _in_runs(q_OI >> planes.low_bits, planes.high_bits)
    found["units"] = _beside(split, "d", "m", padded // planes.unit)
    if planes.minimum:
        found["units"] = found["units"].view(torch.int32)
    if planes.scaled:
        scales = _beside(split, "scales", "minima", padded // planes.group)
        found["scales"] = scales.view(torch.int32)
    return {
        key: plane.t().contiguous() if key in ("scales", "units") else plane
        for key, plane in found.items()
    }


def _padded(plane_OI: Tensor, cols: int) -> Tensor:
    return torch.nn.functional.pad(plane_OI, (0, cols - plane_OI.shape[1]))


def _in_runs(q_OI: Tensor, bits: int) -> Tensor:
    """Integers of so many bits, uint8 `[O, I]`, as runs of bytes in tiles: int32, a row a tile."""
    fields = q_OI.unflatten(1, (-1, 8 // bits, RUN))  # run, field, byte
    byte: Tensor = fields[:, :, 0].clone()
    for k in range(1, 8 // bits):
        byte |= fields[:, :, k] << (bits * k)
    byte = torch.nn.functional.pad(byte, (0, 0, 0, 0, 0, -len(byte) % TILE))
    tiles = byte.unflatten(0, (-1, 2, 8)).unflatten(-1, (2, 4, 4))  # tile, r, g, run, h, t, b
    ordered: Tensor = tiles.permute(0, 3, 2, 5, 4, 1, 6)
    return ordered.flatten(1).contiguous().view(torch.int32)


def _beside(split: dict[str, Tensor], first: str, second: str, count: int) -> Tensor:
    """So many numbers a row; where there are two kinds, one of each in turn."""
    one = _padded(split[first].flatten(1), count)
    if second not in split:
        return one.contiguous()
    return torch.stack((one, _padded(split[second].flatten(1), count)), dim=-1).flatten(1)


def _half(units_OUB: Tensor, at: int) -> Tensor:
    return units_OUB[..., at : at + 2].contiguous().view(torch.float16)


def _nibbles(bytes_OUB: Tensor) -> Tensor:
    """Low nibbles of a run of bytes, then its high ones."""
    return torch.cat((bytes_OUB & 15, bytes_OUB >> 4), dim=-1)


def _word_bits(bytes_OUB: Tensor) -> Tensor:
    """The bits of bytes, the lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_OUB.device)
    return ((bytes_OUB[..., None] >> shifts) & 1).flatten(-2)


def _q4_0(u: Tensor) -> dict[str, Tensor]:
    return {"d": _half(u, 0), "q": _nibbles(u[..., 2:])}


def _q4_1(u: Tensor) -> dict[str, Tensor]:
    return {"d": _half(u, 0), "m": _half(u, 2), "q": _nibbles(u[..., 4:])}


def _q5_0(u: Tensor) -> dict[str, Tensor]:
    return {"d": _half(u, 0), "q": _nibbles(u[..., 6:]) | _word_bits(u[..., 2:6]) << 4}


def _q5_1(u: Tensor) -> dict[str, Tensor]:
    q = _nibbles(u[..., 8:]) | _word_bits(u[..., 4:8]) << 4
    return {"d": _half(u, 0), "m": _half(u, 2), "q": q}


def _q8_0(u: Tensor) -> dict[str, Tensor]:
    return {"d": _half(u, 0), "q": u[..., 2:] ^ 128}


def _pairs_of_bits(bytes_OUB: Tensor) -> Tensor:
    """256 integers of 2 bits: of each 32 bytes, the lowest pairs first."""
    halves = bytes_OUB.unflatten(-1, (2, 32))
    return torch.stack([halves >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-3)


def _q2_k(u: Tensor) -> dict[str, Tensor]:
    both = u[..., :16]
    return {
        "d": _half(u, 80),
        "m": -_half(u, 82),
        "scales": (both & 15).view(torch.int8),
        "minima": (both >> 4).view(torch.int8),
        "q": _pairs_of_bits(u[..., 16:80]),
    }


def _q3_k(u: Tensor) -> dict[str, Tensor]:
    packed = u[..., 96:108]
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), dim=-1)
    upper = packed[..., 8:]
    high = torch.cat([upper >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    fourths = torch.cat([u[..., :32] >> bit & 1 for bit in range(8)], dim=-1)
    return {
        "d": _half(u, 108),
        "scales": (low | high << 4).view(torch.int8) - 32,
        "q": _pairs_of_bits(u[..., 32:96]) | fourths << 2,
    }


def _six_bits(packed: Tensor) -> dict[str, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((a & 63, c & 15 | (a >> 6) << 4), dim=-1)
    minima = torch.cat((b & 63, c >> 4 | (b >> 6) << 4), dim=-1)
    return {"scales": scales.view(torch.int8), "minima": minima.view(torch.int8)}


def _by_32(bytes_OUB: Tensor) -> Tensor:
    """Nibbles, of each 32 bytes the low ones first."""
    return _nibbles(bytes_OUB.unflatten(-1, (-1, 32))).flatten(-2)


def _q4_k(u: Tensor) -> dict[str, Tensor]:
    return {
        "d": _half(u, 0),
        "m": -_half(u, 2),
        **_six_bits(u[..., 4:16]),
        "q": _by_32(u[..., 16:]),
    }


def _q5_k(u: Tensor) -> dict[str, Tensor]:
    fifths = torch.cat([u[..., 16:48] >> bit & 1 for bit in range(8)], dim=-1)
    q = _by_32(u[..., 48:]) | fifths << 4
    return {"d": _half(u, 0), "m": -_half(u, 2), **_six_bits(u[..., 4:16]), "q": q}


def _q6_k(u: Tensor) -> dict[str, Tensor]:
    low = _nibbles(u[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    return {
        "d": _half(u, 208),
        "scales": u[..., 192:208].contiguous().view(torch.int8),
        "q": low | _pairs_of_bits(u[..., 128:192]) << 4,
    }


def _iq4_xs(u: Tensor) -> dict[str, Tensor]:
    high = u[..., 2:4, None] >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=u.device) & 3
    low = torch.stack((u[..., 4:8] & 15, u[..., 4:8] >> 4), dim=-1).flatten(-2)
    scales = (low | high.flatten(-2) << 4).view(torch.int8) - 32
    q = _nibbles(u[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return {"d": _half(u, 0), "scales": scales, "q": q}


_SPLITTERS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _q4_0,
    "IQ4_XS": _iq4_xs,
}
