"""What Triton's compiler makes of products of few tokens, run without a GPU: assembly and layouts,
of which its interpreter knows nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from tests.sharding.kernels.uninterpreted import rows_of

PRODUCTS = ("Q4_K:1:8", "Q6_K:1:2", "Q8_0:4:8", "IQ4_NL:1:1", "Q4_0:8:8", "Q8_0:16:8")
"""Scales that are integers or not, minima, bits in two planes, codes; one matrix instruction's
columns, and more; cuts, of which the last have nothing left. All formats take two minutes:
`python -m tests.sharding.kernels.emulated`."""


def test_compiled_products_are_within_their_bounds(tmp_path: Path) -> None:
    rows = rows_of("tests.sharding.kernels.emulated", *PRODUCTS, cache=tmp_path)
    assert [row["product"] for row in rows] == list(PRODUCTS)
    assert all(row["share"] < 1 for row in rows), rows
