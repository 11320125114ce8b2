"""What Triton's compiler makes of the kernels of decoded tokens, run without a GPU.

    python -m tests.sharding.kernels.emulated [CHECK ...]     where nothing is interpreted

A check is a product as FORMAT:TOKENS:CUTS, its rows in up to so many cuts, attention as
HEADS/KV_HEADSxDIM:POSITION:TOKENS:WINDOW, or one of `ROWS`. Prints how far each is from the truth,
as a share of its bound. Chunks are compiled for compute capability 8.0: later ones have
instructions for them that nothing here knows.
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
from triton.runtime.jit import JITFunction

from sharding.kernels import (
    triton_attention,
    triton_digits,
    triton_matmul,
    triton_products,
    triton_rows,
)
from sharding.kernels.planes import PLANES
from sharding.kernels.triton_plan import Tiles, Way, plan_work
from sharding.kernels.triton_weights import pack
from sharding.model.arch import Activation
from tests.sharding.kernels import bounds, ptx, triton_bounds
from tests.sharding.kernels.world import (
    Heads,
    file_of,
    index_of,
    normal,
    own_weights,
    random_pages,
    random_raw,
)

CHECKS = (
    *(f"{name}:{tokens}:8" for name, at in PLANES.items() if at.quantised for tokens in (1, 16)),
    *("2/2x128:150:1:0", "4/1x64:150:1:100", "2/1x256:90:1:0", "6/2x80:40:3:0", "2/1x128:40:70:0"),
)
ROWS = ("norm", "gate-silu", "gate-gelu", "heads-halves", "heads-adjacent")
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int8: "*i8",
    torch.int64: "*i64",
}  # fmt: skip


class Emulated:
    """Stands for a kernel: what is launched is compiled and emulated."""

    capability = 90

    def __init__(self, function: JITFunction[Any]) -> None:
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
            one = isinstance(value, int) and value == 1
            if parameter.is_constexpr or value is None or one:
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


def rows(name: str) -> float:
    """The share of a kernel that takes a row at a time."""
    Emulated.capability = 90
    kind, _, how = name.partition("-")
    if kind == "norm":
        x_TI, scale_I, residual_TI = normal(3, 100), normal(100, seed=4), normal(3, 100, seed=5)
        found = triton_rows.rms_norm(x_TI, scale_I, 1e-5, residual_TI)
        return share(found, bounds.rms_norm(x_TI, scale_I, 1e-5, 1, residual_TI))
    if kind == "gate":
        activation: Activation = "gelu" if how == "gelu" else "silu"
        gate_up_T2F = normal(2, 2 * 300) * 3
        found = triton_rows.gated(gate_up_T2F, activation)
        return share(found, triton_bounds.gated(gate_up_T2F, activation))
    heads = Heads(3, 1, 90, 70, "halves" if how == "halves" else "adjacent")
    index, pages = index_of(heads, [(0, 5, 4)], 32, rotations=2), random_pages(heads, 32)
    qkv_TX, own = normal(4, 5 * heads.dim), own_weights(heads, bias=True, norms=True)
    found = triton_rows.rotate_and_store(qkv_TX, index, pages, own)
    expected = bounds.rotate_and_store(qkv_TX, index, heads.kv_heads, heads.dim, own)
    return max(
        share(found.unflatten(1, (-1, heads.dim)), expected.q),
        share(pages.k_PGDS[index.page_T, :, :, index.slot_T], expected.k),
        share(pages.v_PGSD[index.page_T, :, index.slot_T], expected.v),
    )


def check(name: str) -> float:
    """The share of one of `CHECKS`, or of `ROWS`."""
    if name in ROWS:
        return rows(name)
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
    for kernel in ("_rms_norm", "_gated", "_rotate_and_store"):
        setattr(triton_rows, kernel, Emulated(getattr(triton_rows, kernel)))
    for name in asked or (*ROWS, *CHECKS):
        sys.stdout.write(json.dumps({"check": name, "share": check(name)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
