"""How the Triton kernels lay a weight out, as a table: the planes of each GGUF format.

A matrix `[O, I]` of a format becomes planes, so that every load is aligned and neighbouring threads
read neighbouring bytes. Columns come in blocks of 256 and groups of 32; rows are padded with zeros
to whole blocks.

    low      int32, the low bits of every stored integer. Byte i of a run of 32 holds columns i,
             32 + i, 64 + i and so on of the run, the first lowest: 2, 4 or 8 bits each. Runs of 16
             rows are a tile, in the order in which 32 threads give them to a tensor core: as
             `[8, 4, 2, 2, 4]`, byte (g, t, h, r, b) is byte 16 h + 4 t + b of row 8 r + g. Tiles
             lie run after run, 16 rows after 16 rows; missing rows are zeros
    high     the bits above, likewise: 1 or 2 bits each
    scales   int32 `[words, O]`, if the format scales its groups' scale once more: four numbers of 8
             bits, those of neighbouring groups of a row; with minima scale, minimum, scale, minimum
    units    `[units of a row, O]`, d, FP16; with minima int32, d and m

    weight = d * scale * (q - offset) + m * minimum

Where there is an offset, the highest bit of q is stored inverted: q - offset in two's complement.
For IQ4, q is looked up in a table of 16; K formats subtract minima, so m is stored negated. Float
formats have one plane, the numbers themselves.

Neither torch nor Triton here: a plan counts with this table, and says what those kernels refuse.
Splitting is `triton_weights.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharding.gguf.reader import TensorInfo

RUN = 32
"""Bytes of a run of integers; the columns that one product of bytes meets."""

BLOCK = 256
"""Columns of a block."""

TILE = 16
"""Rows of a tile."""

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
    def bits(self) -> int:
        """Of an integer."""
        return self.low_bits + self.high_bits

    @property
    def place(self) -> int:
        """Where a byte's lowest bit of an integer is, so that its highest is the byte's sign."""
        return 8 - self.bits if self.offset else 0

    @property
    def largest(self) -> int:
        """Bound on |q - offset|, for the range of dequantised weights."""
        if self.coded:
            return 128
        return max(self.offset, (1 << self.bits) - 1 - self.offset)

    def padded(self, cols: int) -> int:
        """Columns as stored."""
        whole = BLOCK if self.quantised else FLOAT_COLUMNS
        return -(-cols // whole) * whole

    def n_bytes(self, rows: int, cols: int) -> int:
        """Bytes of all planes."""
        cols = self.padded(cols)
        if not self.quantised:
            return rows * cols * self.bits // 8
        integers = -(-rows // TILE) * TILE * cols * self.bits // 8
        scales = cols // self.group * (self.scaled + (self.scaled and self.minimum))
        return integers + rows * (scales + cols // self.unit * 2 * (1 + self.minimum))


NO_MIXTURES = (
    "mixtures of experts are computed by the kernels for CPUs alone, not by those for GPUs: use "
    "--kernels cpu"
)
"""What the set "triton" says of one, also where "auto" chose that set: its user may have counted on
the GPU."""

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
    return PLANES[info.format.name].n_bytes(info.rows, info.cols)
