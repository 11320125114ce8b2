"""The table of GGUF tensor formats, and the slow exact reading of their bytes.

Not here: fast arithmetic on quantised weights (`sharding/kernels`), whose slow twin this is.

A quantised row is a run of equal units of `block_bytes` bytes, each of `block_elements` weights.
In the older formats such a unit is one group, which shares a scale d (and a minimum m):

    Q4_1   | d f16 | m f16 | 32 x 4 bits |                        weight = d * q + m
           low nibbles hold weights 0..15, high nibbles weights 16..31

In the K formats it is a super-block: 8 or 16 groups whose own scales and minima are small integers,
scaled once more for all of them:

    Q4_K   | d f16 | dmin f16 | 8 x (scale, min) of 6 bits | 8 x 32 x 4 bits |
           weight = (d * scale[g]) * q - (dmin * min[g]),  g = the weight's group of 32

"Block" alone keeps its other meaning, a decoder block, everywhere but in the two field names above,
which are GGUF's own. Sizes: ggml's `ggml-common.h` and `ggml_type` enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from numpy.typing import NDArray

from sharding.errors import UnsupportedModelError

_SLAB_ELEMENTS = 1 << 18
"""Elements read at once: the reference makes several float32 copies of what it reads."""


@dataclass(frozen=True)
class QuantFormat:
    """How a tensor's numbers are stored; `type_id` is GGUF's number for it.

    `computed`: whether something here computes with it, or it can only be skipped over.
    """

    name: str
    type_id: int
    block_elements: int
    block_bytes: int
    computed: bool

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` elements, which must be a multiple of `block_elements`."""
        assert cols % self.block_elements == 0, f"{cols} columns of {self.name}"
        return cols // self.block_elements * self.block_bytes


# name, type_id, block_elements, block_bytes
_COMPUTED = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ4_NL", 20, 32, 18),
    ("IQ4_XS", 23, 256, 136),
    ("BF16", 30, 1, 2),
)
_PARSED = (
    ("Q8_1", 9, 32, 40),
    ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
)

FORMATS: dict[int, QuantFormat] = {
    row[1]: QuantFormat(*row, computed=computed)
    for rows, computed in ((_COMPUTED, True), (_PARSED, False))
    for row in rows
}
"""Every tensor format of current GGUF files by its type number. Numbers missing in between belonged
to formats that ggml has removed."""


def dequantise(format: QuantFormat, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Read `raw` uint8 `[rows, row_bytes]` as float32 `[rows, cols]`: the reference for kernels.

    Bytes that spell an infinity or a NaN come out as such, without a warning. Needs the result and
    a few MiB. Raises `UnsupportedModelError` for a format that is not computed.
    """
    if not format.computed:
        names = ", ".join(name for name, *_ in _COMPUTED)
        raise UnsupportedModelError(
            f"tensor format {format.name} is not computed here; convert to one of: {names}"
        )
    assert raw.dtype == np.uint8, raw.dtype
    assert raw.ndim == 2, raw.shape
    rows, row_bytes = raw.shape
    assert row_bytes % format.block_bytes == 0, f"{row_bytes} bytes a row of {format.name}"
    units = np.ascontiguousarray(raw).reshape(-1, format.block_bytes)
    out = np.empty((len(units), format.block_elements), np.float32)
    step = _SLAB_ELEMENTS // format.block_elements
    with np.errstate(all="ignore"):
        for start in range(0, len(units), step):
            slab = units[start : start + step]
            # One long row: the reference loops over runs of 16 rows, which would be 16 units each.
            numbers = gguf_quants.dequantize(
                slab.reshape(1, -1), GGMLQuantizationType(format.type_id)
            )
            out[start : start + step] = numbers.reshape(len(slab), -1)
    return out.reshape(rows, row_bytes // format.block_bytes * format.block_elements)
