"""What a CUDA graph is given from step to step. The graphs themselves run where there is a GPU: in
every decoded token of `test_triton_stage.py`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from sharding.kernels.triton import TritonKernels
from sharding.kernels.triton_graphs import Inputs, Shape
from sharding.kernels.triton_plan import SPLIT, Way
from sharding.model.kv_cache import LayerPages
from tests.sharding.kernels.world import Heads, index_of, normal, random_pages

KERNELS = TritonKernels()
DEVICE = KERNELS.device


def _parts(shape: Shape) -> int:
    return shape.cuts[0][0]


@pytest.mark.parametrize("window", [0, 300])
def test_a_batch_written_into_a_larger_shape_gives_the_same_bits(window: int) -> None:
    """Two steps through one buffer, made for the one with more parts: what is left over of it does
    nothing."""
    heads, length = Heads(4, 2, 64), 3 * SPLIT
    host = random_pages(heads, length, requests=2)
    pages = LayerPages(host.k_PGDS.to(DEVICE), host.v_PGSD.to(DEVICE))
    way = Way(2, 2, window, heads.dim)
    steps = [index_of(heads, [(0, last, 1), (1, 40, 1)], length) for last in (length - 1, 700)]
    cuts = [KERNELS.cuts(step, [way]) for step in steps]
    shape = max((Shape.of(*each) for each in zip(steps, cuts, strict=True)), key=_parts)
    inputs = Inputs(shape, steps[0], DEVICE)
    for step, cut in zip(steps, cuts, strict=True):
        qkv_TX = normal(2, (heads.heads + 2 * heads.kv_heads) * heads.dim).to(DEVICE)
        own = step.to(DEVICE)
        q_TX = KERNELS.rotate_and_store(qkv_TX, own, pages)
        expected = KERNELS.attention(q_TX, own, pages, window)
        inputs.write(step, cut)
        KERNELS.use(inputs.index, {way: inputs.works[0]})
        stored = pages.k_PGDS.clone()
        turned = KERNELS.rotate_and_store(qkv_TX, inputs.index, pages)
        assert torch.equal(turned, q_TX) and torch.equal(pages.k_PGDS, stored)
        assert torch.equal(KERNELS.attention(turned, inputs.index, pages, window), expected)


def test_a_shape_grows_by_powers_of_two() -> None:
    """A graph lasts while the context doubles."""
    heads = Heads(4, 2, 64)
    shapes = set()
    for last in range(2 * SPLIT + 64, 4 * SPLIT, 64):
        index = index_of(heads, [(0, last, 1)], 4 * SPLIT)
        shapes.add(Shape.of(index, KERNELS.cuts(index, [Way(2, 2, 0, heads.dim)])))
    assert len(shapes) == 1


def test_more_shared_heads_than_are_computed_finely_are_no_graph() -> None:
    """Then even a single token is a chunk's item, which graphs do not have."""
    heads = Heads(40, 1, 64)
    index = index_of(heads, [(0, 20, 1)], 64)
    (cut,) = KERNELS.cuts(index, [Way(40, 1, 0, heads.dim)])
    assert cut.chunks and not cut.fine
