"""Reads one architecture's keys of GGUF metadata, each with a type and a range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sharding.errors import CorruptFileError, UnsupportedModelError

Metadata = Mapping[str, Any]

MOST_CONTEXT = 1 << 31
# Bounds that no published model comes near; beyond them a file is hostile or broken.
_MOST = {"block_count": 4096, "head_count": 4096, "embedding_length": 1 << 20}


class KeyReader:
    """Reads `<prefix>.<key>`, naming the key in every complaint."""

    def __init__(self, metadata: Metadata, prefix: str) -> None:
        self.metadata = metadata
        self.prefix = prefix

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise CorruptFileError(f"metadata key {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise UnsupportedModelError(
                f"{name} is {value!r:.60}; one whole number for all layers is expected"
            )
        most = _MOST.get(key.rpartition(".")[2], MOST_CONTEXT)
        if not least <= value <= most:
            raise CorruptFileError(f"{name} is {value}, outside [{least}, {most}]")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise CorruptFileError(f"metadata key {name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CorruptFileError(f"{name} is {value!r:.60}, not a number")
        if not math.isfinite(value) or value <= 0:
            raise CorruptFileError(f"{name} is {value}; a finite number above 0 is expected")
        return float(value)
