"""Each format's reading against bytes and floats worked out by hand, and the table against ggml.

The scales are 0.5 and 0.25 throughout, so every expected number is exact in float32.
"""

from __future__ import annotations

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from sharding.errors import UnsupportedModelError
from sharding.gguf.quants import FORMATS, QuantFormat, dequantise

BY_NAME = {format.name: format for format in FORMATS.values()}

HALF, QUARTER, MINUS_ONE = b"\x00\x38", b"\x00\x34", b"\x00\xbc"  # F16
NIBBLES = bytes(i | (15 - i) << 4 for i in range(16))
UP, DOWN = np.arange(16), 15 - np.arange(16)  # what NIBBLES hold low, then high
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])

# Q4_K and Q5_K: 6-bit scales 1 2 3 4 17 18 19 20 and minima 5 6 7 8 37 38 39 40. The first four
# bytes hold the scales of groups 0-3 under the two high bits (01) of those of groups 4-7, the next
# four likewise the minima (10), the last four the low nibbles of groups 4-7, minima above scales.
K_SCALES = bytes.fromhex("41424344 85868788 51627384")
K_SCALE, K_MIN = np.array([1, 2, 3, 4, 17, 18, 19, 20]), np.array([5, 6, 7, 8, 37, 38, 39, 40])

GROUP_16 = np.arange(16)
PLANE = GROUP_16 // 2 % 4  # which bit pair (or nibble) a group of 16 uses in its half of 128

# Q3_K: scale of group g is stored as 32 + g, but for groups 0-3 as 16 + g; each low nibble pair
# holds groups g and g + 8, bit pair k of the last four bytes the high bits of groups 4k..4k+3.
Q3_SCALES = bytes(g | (8 + g) << 4 for g in range(8)) + b"\xa9" * 4
Q3_SCALE = np.where(GROUP_16 < 4, GROUP_16 - 16, GROUP_16)

# Q6_K: low nibbles 3, 12, 10, 5 and high pairs 0, 1, 2, 3 make 3, 28, 42, 53, less 32.
Q6 = np.array([-29, -4, 10, 21])

# IQ4_XS: low nibbles 1..8 and high pairs 0 1 2 3 0 1 2 3, less 32.
IQ4_SCALE = np.array([-31, -14, 3, 20, -27, -10, 7, 24])

HAND_MADE = {
    "F32": (struct.pack("<3f", 1.5, -2.0, 0.1), np.array([1.5, -2.0, 0.1], np.float32)),
    "F16": (b"\x00\x3e\x00\xc0", [1.5, -2.0]),
    "BF16": (b"\xc0\x3f\x00\xc0", [1.5, -2.0]),
    "Q4_0": (HALF + NIBBLES, 0.5 * (np.append(UP, DOWN) - 8)),
    "Q4_1": (HALF + MINUS_ONE + NIBBLES, 0.5 * np.append(UP, DOWN) - 1),
    "Q5_0": (HALF + b"\xff\xff\0\0" + NIBBLES, 0.5 * (np.append(UP + 16, DOWN) - 16)),
    "Q5_1": (
        HALF + MINUS_ONE + b"\0\0\xff\xff" + NIBBLES,
        0.5 * np.append(UP, DOWN + 16) - 1,
    ),
    "Q8_0": (HALF + struct.pack("<32b", *range(-16, 16)), 0.5 * np.arange(-16, 16)),
    "Q2_K": (
        bytes(g | 1 << 4 for g in range(16)) + b"\xe4" * 64 + HALF + QUARTER,
        np.repeat(0.5 * GROUP_16 * PLANE - 0.25, 16),
    ),
    "Q3_K": (
        b"\x0f" * 32 + b"\xe4" * 64 + Q3_SCALES + HALF,
        np.repeat(0.5 * Q3_SCALE * (PLANE - 4 * (GROUP_16 >= 8)), 16),
    ),
    "Q4_K": (
        HALF + QUARTER + K_SCALES + b"\xa3" * 128,
        np.repeat(0.5 * K_SCALE * np.tile([3, 10], 4) - 0.25 * K_MIN, 32),
    ),
    "Q5_K": (
        HALF + QUARTER + K_SCALES + b"\x0f" * 32 + b"\xa3" * 128,
        np.repeat(0.5 * K_SCALE * [19, 26, 19, 26, 3, 10, 3, 10] - 0.25 * K_MIN, 32),
    ),
    "Q6_K": (
        (b"\xa3" * 32 + b"\x5c" * 32) * 2
        + b"\xe4" * 64
        + struct.pack("<16b", *range(-8, 8))
        + HALF,
        np.repeat(0.5 * (GROUP_16 - 8) * Q6[PLANE], 16),
    ),
    "IQ4_NL": (HALF + NIBBLES, 0.5 * IQ4[np.append(UP, DOWN)]),
    "IQ4_XS": (
        HALF + b"\xe4\xe4" + b"\x21\x43\x65\x87" + NIBBLES * 8,
        np.repeat(0.5 * IQ4_SCALE, 32) * np.tile(IQ4[np.append(UP, DOWN)], 8),
    ),
}


def as_rows(data: bytes, rows: int = 1) -> NDArray[np.uint8]:
    """Bytes as `[rows, row_bytes]`."""
    return np.frombuffer(data * rows, np.uint8).reshape(rows, -1)


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_unit_made_by_hand_gives_the_hand_computed_weights(name: str) -> None:
    data, expected = HAND_MADE[name]
    found = dequantise(BY_NAME[name], as_rows(data))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], expected)


def test_every_computed_format_has_a_hand_made_unit() -> None:
    """A format added to the table without a check would go unnoticed otherwise."""
    assert {name for name, format in BY_NAME.items() if format.computed} == set(HAND_MADE)


def test_the_table_has_the_types_and_sizes_of_ggml() -> None:
    ours = {f.type_id: (f.name, f.block_elements, f.block_bytes) for f in FORMATS.values()}
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert ours.items() <= theirs.items()
    assert {*range(4), *range(6, 31), 34, 35, 39} <= ours.keys()


def test_row_bytes_counts_whole_blocks() -> None:
    assert BY_NAME["Q4_1"].row_bytes(576) == 360
    assert BY_NAME["Q6_K"].row_bytes(512) == 420
    assert BY_NAME["F32"].row_bytes(3) == 12


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if not f.computed])
def test_a_format_not_computed_is_named_beside_those_that_are(name: str) -> None:
    format = BY_NAME[name]
    with pytest.raises(UnsupportedModelError, match=f"{name} .* Q4_0, .*IQ4_XS"):
        dequantise(format, np.zeros((1, format.block_bytes), np.uint8))


@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q4_K"])
def test_rows_and_slabs_do_not_mix(name: str) -> None:
    """A tensor of several slabs, whose borders fall inside rows."""
    format = BY_NAME[name]
    rows, units = 7, 300_000 // format.block_elements // 3
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 120, (rows, units * format.block_bytes), np.uint8)
    found = dequantise(format, raw)
    assert found.shape == (rows, units * format.block_elements)
    single = [dequantise(format, raw[row : row + 1]) for row in range(rows)]
    np.testing.assert_array_equal(found, np.concatenate(single))


def test_columns_cut_out_of_rows_are_read_as_they_are() -> None:
    """A view whose rows are not contiguous must not be read as if they were."""
    data, expected = HAND_MADE["Q8_0"]
    raw = as_rows(data + bytes(34), rows=3)[:, :34]
    np.testing.assert_array_equal(dequantise(BY_NAME["Q8_0"], raw), np.tile(expected, (3, 1)))


@pytest.mark.parametrize(
    "scale", [b"\x00\x7e", b"\x01\x7c", b"\x00\x7c"], ids=["NaN", "sNaN", "inf"]
)
def test_scales_that_are_no_number_pass_through_without_a_warning(scale: bytes) -> None:
    found = dequantise(BY_NAME["Q4_0"], as_rows(scale + NIBBLES))
    assert not np.isfinite(found).any()


def _peak_bytes(format: QuantFormat, raw: NDArray[np.uint8]) -> int:
    tracemalloc.start()
    try:
        dequantise(format, raw)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["F16", "Q5_K"])
def test_memory_is_the_result_and_a_few_mebibytes(name: str) -> None:
    """The reference makes up to ten temporary copies: of a slab, not of the whole tensor."""
    format = BY_NAME[name]
    elements = 1 << 23
    raw = np.zeros((1, format.row_bytes(elements)), np.uint8)
    assert _peak_bytes(format, raw) < 4 * elements + (16 << 20)
