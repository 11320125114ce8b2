"""Ten thousand damaged files: each is refused with a message or loads correctly, in little memory.

The file is tiny, so that nearly every mutation hits the header.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

from sharding.errors import ModelFileError
from sharding.gguf.quants import dequantise
from sharding.gguf.reader import GGUFFile
from tests.tiny_gguf import write_gguf

TINY = write_gguf(
    {
        "general.alignment": 8,
        "name": "tiny",
        "tokens": ["a", "bc", ""],
        "types": np.array([3, 1, 1], np.int32),
        "on": True,
    },
    {
        "w": (bytes(range(40)), (32, 2), "Q4_1"),
        "n": (np.ones(2, np.float32), (2,), "F32"),
    },
    alignment=8,
)
EXTREMES = [
    value % (1 << 64)
    for power in (0, 8, 16, 31, 32, 48, 61, 62, 63, 64)
    for value in ((1 << power) - 1, 1 << power, -(1 << power))
]
MOST_BYTES = 1 << 20
"""A thousand times the file; a count that is believed before it is checked asks for far more."""

Edit = tuple[str, int, int, int]
"""What to do, where, with which byte or extreme, and over how many bytes."""

EDITS = ("flip", "insert", "delete", "truncate", "overwrite4", "overwrite8")


def some_edits(chance: random.Random) -> list[Edit]:
    """One to three. Not from hypothesis, whose own work on ten thousand would take a minute."""
    return [
        (
            chance.choice(EDITS),
            chance.randrange(len(TINY)),
            chance.randrange(256),
            chance.randint(1, 16),
        )
        for _ in range(chance.randint(1, 3))
    ]


def mutate(data: bytes, edit: Edit) -> bytes:
    """`data` with one edit."""
    kind, at, value, length = edit
    number = struct.pack("<Q", EXTREMES[value % len(EXTREMES)])
    match kind:
        case "flip":
            return (
                data[:at]
                + bytes(byte ^ (value or 1) for byte in data[at : at + 1])
                + data[at + 1 :]
            )
        case "insert":
            return data[:at] + bytes([value]) * length + data[at:]
        case "delete":
            return data[:at] + data[at + length :]
        case "truncate":
            return data[:at]
        case "overwrite4":
            return data[:at] + number[:4] + data[at + 4 :]
    return data[:at] + number + data[at + 8 :]


def check_loaded(file: GGUFFile, data: bytes) -> None:
    """A file that was accepted holds together: every tensor inside it, alone, and readable."""
    taken = np.zeros(len(data), np.uint8)
    alignment: Any = file.metadata.get("general.alignment", 32)
    for name, info in file.tensors.items():
        raw = file.raw(name)
        assert raw.shape == (info.rows, info.format.row_bytes(info.cols))
        assert raw.tobytes() == data[info.offset : info.offset + info.n_bytes]
        assert info.offset % alignment == 0
        taken[info.offset : info.offset + info.n_bytes] += 1
        if info.format.computed:
            assert dequantise(info.format, raw).shape == (info.rows, info.cols)
    assert taken.max(initial=0) <= 1
    assert all(key for key in file.metadata)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_refused_or_read_correctly(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(2500):
        edits = some_edits(chance)
        data = TINY
        for edit in edits:
            data = mutate(data, edit)
        tracemalloc.start()
        try:
            check_loaded(GGUFFile.from_bytes(data), data)
        except ModelFileError as error:
            assert str(error).startswith("memory: "), edits
        except Exception as error:
            raise AssertionError(f"not refused but broken by {edits}") from error
        finally:
            _, peak_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak_bytes < MOST_BYTES, edits


def test_the_undamaged_file_is_read() -> None:
    """Else the test above could pass by refusing everything."""
    file = GGUFFile.from_bytes(TINY)
    check_loaded(file, TINY)
    metadata: dict[str, Any] = file.metadata
    assert metadata["tokens"] == ["a", "bc", ""]
    assert list(file.tensors) == ["w", "n"]
