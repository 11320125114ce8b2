"""The output norm and matrix: one call gives what its steps give, and the likeliest token is that
of the logits, the lowest of equals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sharding.kernels import Head, Kernels
from sharding.kernels.reference import ReferenceKernels
from tests.sharding.kernels.instruction_sets import KERNELS
from tests.sharding.kernels.world import FORMAT_NAMES, file_of, normal, random_raw

SETS: dict[str, Kernels] = {**KERNELS, "reference": ReferenceKernels()}
on_every_set = pytest.mark.parametrize("kernels", SETS.values(), ids=SETS)


def head_of(kernels: Kernels, logits_V: NDArray[np.float32]) -> Head:
    """A head whose logits of the hidden state `[1.0]` are these, of `[-1.0]` their negatives."""
    raw = logits_V.astype(np.float32)[:, None].view(np.uint8)
    weight = kernels.pack(file_of(w=("F32", raw)), ["w"])
    return kernels.head(torch.ones(1), 0.0, weight)


@on_every_set
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_one_call_gives_what_the_steps_give(kernels: Kernels, name: str) -> None:
    cols = 512
    weight = kernels.pack(file_of(w=(name, random_raw(name, 100, cols))), ["w"])
    norm_I, x_TI = normal(cols, seed=1), normal(5, cols, seed=2)
    head = kernels.head(norm_I, 1e-5, weight)
    expected = kernels.matmul(kernels.rms_norm(x_TI, norm_I, 1e-5), weight)
    assert torch.equal(head.logits(x_TI), expected)
    assert head.likeliest(x_TI) == expected.argmax(dim=-1).tolist()
    assert torch.equal(head.logits(x_TI[:0]), expected[:0])
    assert head.likeliest(x_TI[:0]) == []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_likeliest_token_of_any_logits(data: st.DataObject) -> None:
    """Few different values, so that equals are the rule; runs of the search end anywhere."""
    vocab = data.draw(st.integers(1, 3000), "vocabulary")
    chance = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    values = np.array([-3e38, -2.5, -1.0, -0.0, 0.0, 1e-40, 1.0, 3e38], np.float32)
    logits_V = chance.choice(values[: data.draw(st.integers(1, 8), "values")], vocab)
    for kernels in SETS.values():
        head = head_of(kernels, logits_V)
        found = head.likeliest(torch.tensor([[1.0], [-1.0]]))
        assert found == [int(logits_V.argmax()), int((-logits_V).argmax())]


@on_every_set
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_left_to_whoever_sees_its_logits(
    kernels: Kernels, bad: float
) -> None:
    for vocab in (1, 15, 16, 17, 1023, 1024, 1040):
        for place in {0, vocab // 2, vocab - 1}:
            logits_V = np.arange(vocab, dtype=np.float32)
            logits_V[place] = bad
            assert head_of(kernels, logits_V).likeliest(torch.ones(1, 1)) == [-1]
