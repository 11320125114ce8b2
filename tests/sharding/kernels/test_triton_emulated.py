"""What Triton's compiler makes of products of few tokens, run without a GPU: assembly and layouts,
of which its interpreter knows nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

PRODUCTS = ("Q4_K:1:8", "Q6_K:1:2", "Q8_0:4:8", "IQ4_NL:1:1", "Q4_0:8:8", "Q8_0:16:8")
"""Scales that are integers or not, minima, bits in two planes, codes; one matrix instruction's
columns, and more; cuts, of which the last have nothing left. All formats take two minutes:
`python -m tests.sharding.kernels.emulated`."""


def test_compiled_products_are_within_their_bounds(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.kernels.emulated", *PRODUCTS],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["product"] for row in rows] == list(PRODUCTS)
    assert all(row["share"] < 1 for row in rows), rows
