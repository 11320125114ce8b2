"""What Triton's compiler makes of the kernels of decoded tokens, run without a GPU.

    python -m tests.sharding.kernels.emulated [CHECK ...]     where nothing is interpreted

A check is a product as FORMAT:TOKENS:CUTS, its rows in up to so many cuts, or attention as
HEADS/KV_HEADSxDIM:POSITION:TOKENS:WINDOW. Prints how far each is from the truth, as a share of its
bound. Chunks are compiled for compute capability 8.0: later ones have instructions for them that
nothing here knows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharding.kernels import triton_attention, triton_digits, triton_matmul, triton_products
from sharding.kernels.planes import PLANES
from sharding.kernels.triton_plan import Tiles, Way, plan_work
from sharding.kernels.triton_weights import pack
from tests.sharding.kernels import bounds, ptx, triton_bounds
from tests.sharding.kernels.world import (
    Heads,
    file_of,
    index_of,
    normal,
    random_pages,
    random_raw,
)

CHECKS = (
    *(f"{name}:{tokens}:8" for name, at in PLANES.items() if at.quantised for tokens in (1, 16)),
    *("2/2x128:150:1:0", "4/1x64:150:1:100", "2/1x256:90:1:0", "6/2x80:40:3:0", "2/1x128:40:70:0"),
)
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int8: "*i8",
    torch.int64: "*i64",
}  # fmt: skip


class Emulated:
    """Stands for a kernel: what is launched is compiled and emulated."""

    capability = 90

    def __init__(self, function: Any) -> None:  # noqa: ANN401  # Triton's own
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: object, num_warps: int = 4, num_stages: int = 3) -> None:
            self._launch(grid, values, {"num_warps": num_warps, "num_stages": num_stages})

        return launch

    def _launch(
        self, grid: tuple[int, ...], values: Sequence[object], options: dict[str, int]
    ) -> None:
        signature: dict[str, str] = {}
        constants: dict[str, object] = {}
        hints: dict[tuple[int, ...], list[list[str | int]]] = {}
        passed: list[object] = []
        named = zip(self._function.params, values, strict=True)
        for number, (parameter, value) in enumerate(named):
            tensor = isinstance(value, torch.Tensor)
            # As a launch does: a 1 is a constant, multiples of 16 are told.
            if parameter.is_constexpr or (not tensor and value == 1 and isinstance(value, int)):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = (
                _POINTERS[value.dtype]
                if isinstance(value, torch.Tensor)
                else "fp32"
                if isinstance(value, float)
                else "i32"
            )
            if tensor or (isinstance(value, int) and value % 16 == 0):
                hints[(number,)] = [["tt.divisibility", 16]]
            passed.append(value)
        source = ASTSource(self._function, signature, constants, hints)
        target = GPUTarget("cuda", self.capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        threads, shared = 32 * options["num_warps"], compiled.metadata.shared
        ptx.run(compiled.asm["ptx"], shared, threads, grid, passed, ptx.Memory())


def share(found: torch.Tensor, truth_and_bound: tuple[torch.Tensor, torch.Tensor]) -> float:
    """How far a result is from the truth, of its bound: above 1 it is wrong."""
    truth, bound = truth_and_bound
    return float(((found.double() - truth).abs() / bound).nan_to_num(torch.inf).max())


def product(name: str, tokens: int, cuts: int, rows: int = 40, cols: int = 2304) -> float:
    """The share of a product."""
    raw = random_raw(name, rows, cols)
    file = file_of(w=(name, raw))
    device = torch.device("cpu")
    weight = pack(file, [file.tensors["w"]], device)
    triton_products.MOST_CUTS, Emulated.capability = cuts, 90
    products = triton_products.Products(device, triton_products.Tiles())
    x_TI, residual_TO = normal(tokens, cols), normal(tokens, rows, seed=3)
    found = products.matmul(x_TI, weight, residual_TO)
    exact = bounds.exact_weight(name, raw)
    return share(found, triton_bounds.matmul(x_TI, exact, weight.parts[0], residual_TO))


def attention(heads: Heads, position: int, tokens: int, window: int) -> float:
    """The share of the attention of some tokens of a request."""
    pages = random_pages(heads, position + tokens)
    index = index_of(heads, [(0, position, tokens)], position + tokens)
    q_TX = normal(tokens, heads.heads * heads.dim) * 2
    way, tiles = Way(heads.heads // heads.kv_heads, heads.kv_heads, window, heads.dim), Tiles()
    work = plan_work(index, way, tiles)
    Emulated.capability = 90 if work.chunks is None else 80
    found = triton_attention.attend(q_TX, index, pages, window, work, tiles)
    q_THD = q_TX.unflatten(1, (-1, heads.dim))
    fine = work.chunks is None
    truth_and_bound = triton_bounds.attention(q_THD, index.rows[0], pages, window, fine, 60)
    return share(found.unflatten(1, (-1, heads.dim)), truth_and_bound)


def check(name: str) -> float:
    """The share of one of `CHECKS`."""
    first, *numbers = name.split(":")
    if "/" not in first:
        tokens, cuts = map(int, numbers)
        return product(first, tokens, cuts)
    position, tokens, window = map(int, numbers)
    heads, kv_heads, dim = map(int, first.replace("/", "x").split("x"))
    return attention(Heads(heads, kv_heads, dim), position, tokens, window)


def main(asked: Sequence[str]) -> None:
    """The checks asked for, or all."""
    triton_matmul._few = Emulated(triton_matmul._few)
    triton_digits._digits = Emulated(triton_digits._digits)
    for kernel in ("_attend", "_merge", "_round_queries"):
        setattr(triton_attention, kernel, Emulated(getattr(triton_attention, kernel)))
    for name in asked or CHECKS:
        sys.stdout.write(json.dumps({"check": name, "share": check(name)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
