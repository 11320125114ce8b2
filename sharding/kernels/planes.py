"""How the Triton kernels lay a weight out, as a table: the planes of each GGUF format.

A matrix `[O, I]` of a format becomes planes, each `[O, ...]` and row-major, so that neighbouring
threads read neighbouring bytes and every load is aligned:

    low      the low bits of every stored integer, c columns to a word: 4 bits, c = 8, and 8 bits,
             c = 4, in int32; 2 bits, c = 8, in int16. Of a block of 32 words, 32 c columns, field j
             of word w is column 32 j + w: field by field, words are whole groups
    high     the bits above, likewise: 1 bit -> uint8, 2 bits -> int16
    scales   int8 per group, if the format scales its groups' scale once more; with minima int16,
             scale and minimum
    units    d, FP16 per unit; with minima int32, d and m

    weight = d * scale * (q - offset) + m * minimum

(for IQ4, q is looked up in a table of 16; K formats subtract minima, so m is stored negated). Rows
are padded with zeros to whole blocks. Float formats have one plane, the numbers themselves.

Neither torch nor Triton here: the planner counts with this table. Splitting is `triton_weights.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharding.gguf.reader import TensorInfo

WORDS = 32
"""Words of a block."""

FLOAT_COLUMNS = 64
"""Columns of the float formats are padded with zeros to a multiple of this."""


@dataclass(frozen=True)
class Planes:
    """A row of the table. `group` columns share a scale, `unit` columns share d.

    `kind`: what the bits are, "int", "f16", "bf16" or "f32".
    """

    low_bits: int
    high_bits: int = 0
    offset: int = 0
    group: int = 32
    unit: int = 32
    scaled: bool = False
    minimum: bool = False
    coded: bool = False
    kind: str = "int"

    @property
    def quantised(self) -> bool:
        """Whether there are integers and scales, not floats."""
        return self.kind == "int"

    @property
    def columns(self) -> int:
        """Columns of a word of the low plane."""
        return 8 if self.low_bits <= 4 else 32 // self.low_bits

    @property
    def largest(self) -> int:
        """Bound on |q - offset|, for the range of dequantised weights."""
        if self.coded:
            return 128
        return max(self.offset, (1 << self.low_bits + self.high_bits) - 1 - self.offset)

    def padded(self, cols: int) -> int:
        """Columns as stored."""
        whole = WORDS * self.columns if self.quantised else FLOAT_COLUMNS
        return -(-cols // whole) * whole

    def row_bytes(self, cols: int) -> int:
        """Bytes of all planes for a row of so many columns."""
        cols = self.padded(cols)
        total = cols * (self.low_bits + self.high_bits) // 8
        if self.quantised:
            total += cols // self.group * (self.scaled + (self.scaled and self.minimum))
            total += cols // self.unit * 2 * (1 + self.minimum)
        return total


PLANES: dict[str, Planes] = {
    "F32": Planes(32, kind="f32"),
    "F16": Planes(16, kind="f16"),
    "BF16": Planes(16, kind="bf16"),
    "Q4_0": Planes(4, offset=8),
    "Q4_1": Planes(4, minimum=True),
    "Q5_0": Planes(4, 1, offset=16),
    "Q5_1": Planes(4, 1, minimum=True),
    "Q8_0": Planes(8, offset=128),
    "Q2_K": Planes(2, group=16, unit=256, scaled=True, minimum=True),
    "Q3_K": Planes(2, 1, offset=4, group=16, unit=256, scaled=True),
    "Q4_K": Planes(4, unit=256, scaled=True, minimum=True),
    "Q5_K": Planes(4, 1, unit=256, scaled=True, minimum=True),
    "Q6_K": Planes(4, 2, offset=32, group=16, unit=256, scaled=True),
    "IQ4_NL": Planes(4, coded=True),
    "IQ4_XS": Planes(4, unit=256, scaled=True, coded=True),
}


def planes_resident(info: TensorInfo) -> int:
    """Bytes in memory under the Triton kernels: planes, float32 if a vector."""
    if len(info.shape) == 1:
        return 4 * info.elements
    return info.rows * PLANES[info.format.name].row_bytes(info.cols)
