"""The Triton kernels through the compiler, for GPUs that need not be here: what only an interpreter
has seen may not compile, or not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")


from tests.sharding.kernels.uninterpreted import rows_of

ROWS = ("norm", "gated", "rotate", "draw", "digits", "halve", "finish", "gather", "round")


@pytest.mark.parametrize(
    ("capability", "names"),
    [("80", ("Q4_1", "D128")), ("90", ("Q3_K", "IQ4_XS", "few F16", "D256", *ROWS))],
)
def test_kernels_compile_and_fit(capability: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """For Ampere, the oldest served, and for Hopper. Decoding keeps everything in registers, reads
    16 bytes at a time and spends few instructions on a weight; 16 tokens nearly so."""
    only = [argument for name in names for argument in ("--only", name)]
    found = rows_of("bench.triton_code", "--capability", capability, *only, cache=tmp_path)
    rows = {row["test"]: row for row in found}
    assert all(any(name in row for row in rows) for name in names)
    for name, row in rows.items():
        assert row["shared_bytes"] <= 99 << 10, row  # of capability 8.6 and 8.9; others have more
        if name.startswith("few"):
            decoding = name.endswith(" T1")
            assert row["spilled_bytes"] <= (0 if decoding else 56) and row["wide_loads"] > 0, row
            assert row["instructions_a_weight"] < (16 if decoding else 22), row
        if name.startswith(("few", "attention")):
            assert row["products"] > 0, row
