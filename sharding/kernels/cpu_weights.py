"""Weights of the compiled CPU kernels: packed from a file's bytes, and as the C++ takes them.

Imported by `cpu.py` alone, which says what is missing where the kernels were not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.cost import PANEL_ROWS
from sharding.errors import UnsupportedModelError
from sharding.kernels import _cpu
from sharding.kernels.block_weights import DenseWeights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sharding.gguf.reader import GGUFFile, TensorInfo
    from sharding.kernels import Weight
    from sharding.kernels.block_weights import ExpertWeights


def pack(native: _cpu.Kernels, file: GGUFFile, names: Sequence[str]) -> _cpu.Weight:
    """Tensors of equal columns, stacked by rows. Raises `UnsupportedModelError`."""
    return _pack(native, [_Rows.of(file, name) for name in names])


def pack_experts(
    native: _cpu.Kernels, file: GGUFFile, names: Sequence[str]
) -> Sequence[_cpu.Weight]:
    """The same of each expert's part of tensors `[cols, rows, experts]`."""
    tensors = [_Rows.of(file, name) for name in names]
    experts = file.tensors[names[0]].shape[2]
    return [
        _pack(native, [tensor.part(number, experts) for tensor in tensors])
        for number in range(experts)
    ]


def _pack(native: _cpu.Kernels, tensors: Sequence[_Rows]) -> _cpu.Weight:
    weight = _cpu.Weight(tensors[0].info.cols, native)
    for alike in _alike(tensors):
        weight.append(
            alike[0].info.format.type_id,
            [len(tensor.raw) for tensor in alike],
            [tensor.raw.ctypes.data for tensor in alike],
            alike[0].raw.shape[1],
        )
    return weight


@dataclass(frozen=True)
class _Rows:
    """A tensor's bytes `[rows, row_bytes]`, or those of some of its rows."""

    info: TensorInfo
    raw: NDArray[np.uint8]

    @classmethod
    def of(cls, file: GGUFFile, name: str) -> _Rows:
        info = file.tensors[name]
        if not info.format.computed:
            raise UnsupportedModelError(
                f"tensor {name} has quantisation {info.format.name}, which is not computed"
            )
        raw = file.raw(name)
        assert raw.flags.c_contiguous and len(raw) == info.rows, name
        return cls(info, raw)

    def part(self, number: int, parts: int) -> _Rows:
        """One of so many equal parts."""
        rows = len(self.raw) // parts
        return _Rows(self.info, self.raw[number * rows : (number + 1) * rows])


def _alike(tensors: Sequence[_Rows]) -> list[list[_Rows]]:
    """Runs of tensors of one format, which are one matrix to the kernels: one call computes them.
    Only the last of a run may end within a panel."""
    runs: list[list[_Rows]] = []
    for tensor in tensors:
        before = runs[-1][-1] if runs else None
        whole = before is not None and len(before.raw) % PANEL_ROWS == 0
        if before and whole and before.info.format == tensor.info.format:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def native_feed_forward(feed: DenseWeights | ExpertWeights) -> _cpu.FeedForward:
    """The C++ keeps addresses: whoever has this has to keep the weights too."""
    router, used = None, 1
    if isinstance(feed, DenseWeights):
        gate_up, down = [native_weight(feed.gate_up)], [native_weight(feed.down)]
    else:
        router, used = native_weight(feed.router), feed.used
        gate_up, down = [*map(native_weight, feed.gate_up)], [*map(native_weight, feed.down)]
    hidden, ffn = gate_up[0].cols, down[0].cols
    assert all((one.rows, one.cols) == (2 * ffn, hidden) for one in gate_up), (hidden, ffn)
    assert all((one.rows, one.cols) == (hidden, ffn) for one in down), (hidden, ffn)
    assert router is None or router.cols == hidden, router.cols
    return _cpu.FeedForward(router, gate_up, down, used)


def native_weight(weight: Weight) -> _cpu.Weight:
    """The same, known as one of these kernels'."""
    assert isinstance(weight, _cpu.Weight), "a weight of another kernel set"
    return weight
