"""The Triton kernels one by one, each against what the card can do at that moment.

    python -m bench.gpu_kernels [--formats Q4_K,Q6_K] [--only T1] [--keep]
    TRITON_INTERPRET=1 python -m bench.gpu_kernels --tiny     does it run? its times mean nothing

Figures of a row, from median times. Products and attention run over copies of their operands that
are more than the cache holds, in a CUDA graph, as a decoded token runs them; the others by Triton's
`do_bench`, which empties the cache in between:

    us               of one call on the device, all kernels of it
    kernel_us        of a product of few tokens whose activations are digits already; kernel_of_copy
    gb_s, of_copy    bytes that must be read (planes, KV, activations) and their share of what
                     copying memory reaches, counted as read and written
    tflop_s, of_gemm two for each multiplication and addition, and their share of torch's bf16 GEMM
    library_us       torch's own kernel on the same numbers where it has one: `mm` on weights that
                     are FP16 already, `scaled_dot_product_attention` on keys and values that lie in
                     a row
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import triton
import typer
from torch.nn.functional import scaled_dot_product_attention

from bench.operands import Heads, Shape, filled_layers, one_request, raw_file
from bench.report import Report
from sharding.batch import SamplingParams
from sharding.gguf.reader import GGUFFile
from sharding.kernels.triton import TritonKernels, interpreted
from sharding.kernels.triton_products import FEW_TOKENS
from sharding.kernels.triton_weights import PlanesWeight
from sharding.model.kv_cache import LayerPages

FORMATS = ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_K", "F16")
SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096))
HEADS: tuple[Heads, ...] = ((32, 32, 128), (32, 8, 128), (4, 1, 256))
DEPTH, CHUNK = 65536, 4096
COLD_BYTES, MOST_COPIES, REPLAYS = 250_000_000, 30, 9


@dataclass(frozen=True)
class Case:
    """A row: what is called, once on each copy of its operands; the bytes it must read, its
    operations, how a library does it, the kernel proper without what comes before it."""

    test: str
    calls: Sequence[Callable[[], object]]
    n_bytes: int = 0
    flops: int = 0
    library: Callable[[], object] | None = None
    kernel: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True)
class Sizes:
    """Of the operands; `tiny` ones for the interpreter."""

    shapes: tuple[Shape, ...]
    heads: tuple[Heads, ...]
    depth: int
    chunk: int


REAL = Sizes(SHAPES, HEADS, DEPTH, CHUNK)
TINY = Sizes(((64, 512),), ((4, 2, 64),), 300, 70)


class Cases:
    """The rows to measure."""

    def __init__(self, kernels: TritonKernels, sizes: Sizes, formats: Sequence[str]) -> None:
        self._kernels = kernels
        self._formats = formats
        self._sizes = sizes
        self._device = kernels.device

    def all(self) -> Iterator[Case]:
        """One after the other: the memory of one is free before the next."""
        for format in self._formats:
            for shape in self._sizes.shapes:
                yield from self._products(format, shape)
        for heads in self._sizes.heads:
            yield from self._attention(heads)
        for tokens in (1, self._sizes.chunk):
            yield from self._rows(tokens)
        logits_V = torch.randn(self._sizes.shapes[-1][0], device=self._device)
        draw = partial(self._kernels.draw, logits_V, SamplingParams(seed=1), 2, 1, None)
        yield Case(f"draw of {len(logits_V)}", [draw], logits_V.nbytes)

    def _products(self, format: str, shape: Shape) -> Iterator[Case]:
        kernels, (rows, cols) = self._kernels, shape
        file = raw_file(format, shape)
        first = self._packed(file)
        copies = [first, *(self._packed(file) for _ in range(_more(first.n_bytes)))]
        expanded_OI = kernels.embed(first, range(rows)).half()
        for tokens in (1, 4, 16, self._sizes.chunk):
            x_TI = torch.randn(tokens, cols, device=self._device)
            few = tokens <= FEW_TOKENS and format != "F16"
            digits = kernels.products.digits(x_TI) if few else None
            yield Case(
                f"matmul {format} {rows}x{cols} T{tokens}",
                [partial(kernels.matmul, x_TI, weight) for weight in copies],
                first.n_bytes + x_TI.nbytes,
                2 * rows * cols * tokens,
                partial(torch.mm, x_TI.half(), expanded_OI.t()),
                [partial(kernels.products.of_digits, digits, weight) for weight in copies]
                if digits
                else (),
            )

    def _packed(self, file: GGUFFile) -> PlanesWeight:
        weight = self._kernels.pack(file, ["w"])
        assert isinstance(weight, PlanesWeight), "a weight of another kernel set"
        return weight

    def _attention(self, heads: Heads) -> Iterator[Case]:
        queries, groups, dim = heads
        first = filled_layers(1, heads, self._sizes.depth)[0]
        n_bytes = self._sizes.depth * groups * dim * 4
        copies = [self._on_device(first) for _ in range(1 + _more(n_bytes))]
        for tokens in (1, 16, 64, self._sizes.chunk):
            depth = self._sizes.depth - tokens
            index = one_request(heads, depth, tokens).to(self._device)
            q_TX = torch.randn(tokens, queries * dim, device=self._device)
            seen = tokens * depth + tokens * (tokens + 1) // 2
            yield Case(
                f"attention {queries}/{groups} heads T{tokens} @ d{depth}",
                [partial(self._kernels.attention, q_TX, index, pages) for pages in copies],
                n_bytes + q_TX.nbytes,
                4 * queries * dim * seen,
                self._library_attention(heads, tokens) if tokens == 1 else None,
            )

    def _rows(self, tokens: int) -> Iterator[Case]:
        """What a block does a row at a time; bytes are those read and written."""
        kernels, heads = self._kernels, self._sizes.heads[0]
        (width, _), (queries, groups, dim) = self._sizes.shapes[0], heads
        x_TI = torch.randn(tokens, width, device=self._device)
        scale_I = torch.randn(width, device=self._device)
        norm = partial(kernels.rms_norm, x_TI, scale_I, 1e-5)
        yield Case(f"rms_norm {width} T{tokens}", [norm], 2 * x_TI.nbytes)
        gate_up = torch.randn(tokens, 2 * width, device=self._device)
        gate = partial(kernels.gated, gate_up)
        yield Case(f"gated_silu {width} T{tokens}", [gate], gate_up.nbytes * 3 // 2)
        pages = self._on_device(filled_layers(1, heads, tokens)[0])
        index = one_request(heads, 0, tokens).to(self._device)
        qkv_TX = torch.randn(tokens, (queries + 2 * groups) * dim, device=self._device)
        written = tokens * dim * (4 * queries + 2 * 2 * groups)
        turn = partial(kernels.rotate_and_store, qkv_TX, index, pages)
        yield Case(f"rotate_and_store T{tokens}", [turn], qkv_TX.nbytes + written)
        weight = kernels.pack(raw_file("Q4_K", self._sizes.shapes[0]), ["w"])
        ids = torch.randint(0, weight.rows, (tokens,)).tolist()
        read = weight.n_bytes // weight.rows * tokens
        embed = partial(kernels.embed, weight, ids)
        yield Case(f"embed Q4_K T{tokens}", [embed], read + 4 * weight.cols * tokens)

    def _library_attention(self, heads: Heads, tokens: int) -> Callable[[], object]:
        queries, groups, dim = heads
        q = torch.randn(1, queries, tokens, dim, device=self._device).half()
        k, v = (
            torch.randn(1, groups, self._sizes.depth, dim, device=self._device).half()
            for _ in range(2)
        )
        return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=queries != groups)

    def _on_device(self, pages: LayerPages) -> LayerPages:
        return LayerPages(pages.k_PGDS.to(self._device), pages.v_PGSD.to(self._device))


def _more(n_bytes: int) -> int:
    """Copies beside the first that make more than a GPU's cache holds; none to interpret."""
    return 0 if interpreted() else min(COLD_BYTES // n_bytes, MOST_COPIES)


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, the median on a GPU; interpreted, one call's."""
    if interpreted():
        begin = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - begin) * 1e6
    if len(calls) == 1:
        return float(triton.testing.do_bench(calls[0], return_mode="median")) * 1e3
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = [_elapsed_us(graph) / len(calls) for _ in range(REPLAYS)]
    return sorted(found)[len(found) // 2]


def _elapsed_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


class Ceilings:
    """What the device reaches: copying, and multiplying bf16 matrices."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        size = 256 if tiny else 8192
        self._a, self._b = (
            torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self._from = torch.ones(1 << (20 if tiny else 30), dtype=torch.int8, device=device)
        self._to = torch.empty_like(self._from)

    def copy_gb_s(self) -> float:
        """Read and written."""
        return 2 * self._from.nbytes / time_us([lambda: self._to.copy_(self._from)]) / 1e3

    def gemm_tflop_s(self) -> float:
        """Of bf16."""
        return 2 * len(self._a) ** 3 / time_us([lambda: self._a @ self._b]) / 1e6


def figures(case: Case, ceilings: Ceilings) -> dict[str, float]:
    """A row's figures."""
    us, copy, gemm = time_us(case.calls), ceilings.copy_gb_s(), ceilings.gemm_tflop_s()
    gb_s, tflop_s = case.n_bytes / us / 1e3, case.flops / us / 1e6
    found = {
        "us": us,
        "gb_s": gb_s,
        "of_copy": gb_s / copy,
        "tflop_s": tflop_s,
        "of_gemm": tflop_s / gemm,
        "copy_gb_s": copy,
        "gemm_tflop_s": gemm,
    }
    if case.library is not None:
        found["library_us"] = time_us([case.library])
    if case.kernel:
        found["kernel_us"] = time_us(case.kernel)
        found["kernel_of_copy"] = case.n_bytes / found["kernel_us"] / 1e3 / copy
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def describe_gpu(device: torch.device) -> dict[str, str]:
    """The card, its driver's CUDA, torch and Triton."""
    about = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type != "cuda":
        return about | {"gpu": "none: interpreted"}
    return about | {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
    }


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main(
    only: Annotated[str, typer.Option(help="Rows whose name has this.")] = "",
    formats: Annotated[str, typer.Option(help="Of the products' weights.")] = ",".join(FORMATS),
    tiny: Annotated[bool, typer.Option(help="Small operands, for the interpreter.")] = False,
    keep: Annotated[bool, typer.Option(help="Write results/gpu_kernels.json.")] = False,
) -> None:
    """Measure every kernel."""
    kernels = TritonKernels()
    report = Report("gpu_kernels", keep)
    about = describe_gpu(kernels.device)
    ceilings = Ceilings(kernels.device, tiny)
    with torch.inference_mode():
        sizes = TINY if tiny else REAL
        for case in Cases(kernels, sizes, formats.split(",") if formats else ()).all():
            if only in case.test:
                report.row(test=case.test, **about, **figures(case, ceilings))


if __name__ == "__main__":
    typer.run(main)
