"""What Triton's compiler makes of the kernels of decoded tokens, run without a GPU: assembly and
layouts, of which its interpreter knows nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from tests.sharding.kernels.uninterpreted import rows_of

PRODUCTS = ("Q4_K:1:8", "Q6_K:1:2", "Q8_0:4:8", "IQ4_NL:1:1", "Q4_0:8:8", "Q8_0:16:8")
"""Scales that are integers or not, minima, bits in two planes, codes; one matrix instruction's
columns, and more; cuts, of which the last have nothing left. All formats take two minutes:
`python -m tests.sharding.kernels.emulated`."""

ATTENTIONS = ("2/2x128:150:1:0", "4/1x64:150:1:100", "6/2x80:40:3:0")
"""Runs of slots that are merged, a window, heads that fill no tile and several tokens."""


ROWS = ("norm", "gate-gelu", "heads-halves", "heads-adjacent")
"""Norms on top of a residual, GELU, heads with a bias and norms."""


@pytest.mark.parametrize(
    "checks", [PRODUCTS, ATTENTIONS, ROWS], ids=["products", "attention", "rows"]
)
def test_what_is_compiled_is_within_its_bounds(checks: tuple[str, ...], tmp_path: Path) -> None:
    rows = rows_of("tests.sharding.kernels.emulated", *checks, cache=tmp_path)
    assert [row["check"] for row in rows] == list(checks)
    assert all(row["share"] < 1 for row in rows), rows
