"""What a CUDA graph is given from step to step. The graphs themselves run where there is a GPU: in
every decoded token of `test_triton_stage.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from sharding.kernels.triton import TritonKernels
from sharding.kernels.triton_graphs import CapturedGraph, Graphs, Inputs, Shape
from sharding.kernels.triton_plan import SPLIT, Items, Way, Work
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages
from tests.sharding.kernels.world import Heads, index_of, normal, random_pages

KERNELS = TritonKernels()
DEVICE = KERNELS.device


def _parts(shape: Shape) -> int:
    return shape.cuts[0][0]


def own_window_pages(index: BatchIndex) -> BatchIndex:
    """Layers with a window have page tables of their own."""
    windowed = [replace(rows, pages=rows.pages.flip(0)) for rows in index.rows]
    return replace(index, window_rows=tuple(windowed))


@pytest.mark.parametrize(
    ("window", "own_pages"), [(0, False), (300, False), (0, True), (300, True)]
)
def test_a_batch_written_into_a_larger_shape_gives_the_same_bits(
    window: int, own_pages: bool
) -> None:
    """Two steps through one buffer, made for the one with more parts: what is left over of it does
    nothing."""
    heads, length = Heads(4, 2, 64), 3 * SPLIT
    host = random_pages(heads, length, requests=2)
    pages = LayerPages(host.k_PGDS.to(DEVICE), host.v_PGSD.to(DEVICE))
    way = Way(2, 2, window, heads.dim)
    steps = [index_of(heads, [(0, last, 1), (1, 40, 1)], length) for last in (length - 1, 700)]
    steps = [own_window_pages(step) for step in steps] if own_pages else steps
    cuts = [KERNELS.cuts(step, [way]) for step in steps]
    shape = max((Shape.of(*each) for each in zip(steps, cuts, strict=True)), key=_parts)
    inputs = Inputs(shape, steps[0], DEVICE)
    for step, cut in zip(steps, cuts, strict=True):
        qkv_TX = normal(2, (heads.heads + 2 * heads.kv_heads) * heads.dim).to(DEVICE)
        own = step.to(DEVICE).seen_by(window)
        q_TX = KERNELS.rotate_and_store(qkv_TX, own, pages)
        expected = KERNELS.attention(q_TX, own, pages, window)
        inputs.write(step, cut)
        inputs.submit()
        KERNELS.use(inputs.index, {way: inputs.works[0]})
        stored, at = pages.k_PGDS.clone(), inputs.index.seen_by(window)
        turned = KERNELS.rotate_and_store(qkv_TX, at, pages)
        assert torch.equal(turned, q_TX) and torch.equal(pages.k_PGDS, stored)
        assert torch.equal(KERNELS.attention(turned, at, pages, window), expected)


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
    assert cut.chunks and not len(cut.fine)


@dataclass
class Eager:
    """What stands for a captured graph: the same call again, on the same tensors."""

    run: Callable[[], torch.Tensor]
    y: torch.Tensor

    def replay(self) -> None:
        """Its result is where the first one was."""
        self.y.copy_(self.run())


class EagerGraphs(Graphs):
    """Without the GPU that captures. `planned` counts batches that nobody had foreseen."""

    planned = 0

    def _planned(self, index: BatchIndex, x_TI: torch.Tensor) -> CapturedGraph | None:
        self.planned += 1
        return super()._planned(index, x_TI)

    def _make(
        self, shape: Shape, x_TI: torch.Tensor, index: BatchIndex, cuts: Sequence[Items]
    ) -> CapturedGraph:
        inputs, x = Inputs(shape, index, DEVICE), x_TI.clone()
        inputs.write(index, cuts)
        inputs.submit()

        def run() -> torch.Tensor:
            return self._blocks(x, inputs.index, inputs.works)

        y = run()
        return CapturedGraph(shape, inputs, x, Eager(run, y), y)


def test_steps_are_foreseen_and_others_are_planned_anew() -> None:
    """Two requests' tokens one after the other, alone and together, to the end of their room; the
    results are those of a batch that is no graph."""
    heads, length = Heads(4, 2, 64), 96
    host = random_pages(heads, length, requests=2)
    pages = LayerPages(host.k_PGDS.to(DEVICE), host.v_PGSD.to(DEVICE))
    way = Way(2, 2, 0, heads.dim)
    tables = [index_of(heads, [(0, 0, 1), (1, 0, 1)], length).rows[r].pages for r in range(2)]

    def blocks(x: torch.Tensor, index: BatchIndex, works: Sequence[Work]) -> torch.Tensor:
        KERNELS.use(index, {way: works[0]})
        return KERNELS.attention(KERNELS.rotate_and_store(x, index, pages), index, pages)

    graphs = EagerGraphs(DEVICE, blocks, lambda index: KERNELS.cuts(index, [way]))
    steps = [
        *([(0, position)] for position in (60, 61, 62, 63)),  # one more part after the last
        [(0, 64)],
        [(1, 65)],
        [(0, 66), (1, 65)],
        [(0, 67), (1, 66)],
        [(0, 68), (1, 65)],  # one of them again, as after a repair
        *([(1, position)] for position in (93, 94, 95)),
        [(1, 94)],
    ]
    foreseen = 0
    for step in steps:
        runs = [(request, position, 1) for request, position in step]
        index = index_of(heads, runs, length)
        rows = [
            replace(rows, pages=tables[request])
            for rows, (request, _) in zip(index.rows, step, strict=True)
        ]
        index = replace(index, rows=tuple(rows)).to(DEVICE)
        x_TX = normal(len(step), (heads.heads + 2 * heads.kv_heads) * heads.dim).to(DEVICE)
        before = graphs.planned
        found = graphs.run(x_TX, index)
        foreseen += graphs.planned == before
        KERNELS.use(index, {})
        expected = KERNELS.attention(KERNELS.rotate_and_store(x_TX, index, pages), index, pages)
        assert found is not None and torch.equal(found, expected), step
    assert foreseen == 6
