"""Products of few tokens as Triton's compiler makes them for a GPU, run without one.

    python -m tests.sharding.kernels.emulated [FORMAT:TOKENS:CUTS ...]     where nothing interprets

Prints for each product, its rows in up to so many cuts, how far it is from the truth, as a share of
its bound.
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

from sharding.kernels import triton_digits, triton_matmul, triton_products
from sharding.kernels.planes import PLANES
from sharding.kernels.triton_weights import pack
from tests.sharding.kernels import bounds, ptx, triton_bounds
from tests.sharding.kernels.world import file_of, normal, random_raw

TARGET = GPUTarget("cuda", 90, 32)
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int8: "*i8",
    torch.int64: "*i64",
}  # fmt: skip


class Emulated:
    """Stands for a kernel: what is launched is compiled and emulated."""

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
        compiled = triton.compile(source, target=TARGET, options=options)
        threads, shared = 32 * options["num_warps"], compiled.metadata.shared
        ptx.run(compiled.asm["ptx"], shared, threads, grid, passed, ptx.Memory())


def error(name: str, tokens: int, rows: int, cols: int) -> float:
    """Of a product, as a share of its bound: above 1 it is wrong."""
    raw = random_raw(name, rows, cols)
    file = file_of(w=(name, raw))
    device = torch.device("cpu")
    weight = pack(file, [file.tensors["w"]], device)
    products = triton_products.Products(device, triton_products.Tiles())
    x_TI, residual_TO = normal(tokens, cols), normal(tokens, rows, seed=3)
    found = products.matmul(x_TI, weight, residual_TO)
    exact = bounds.exact_weight(name, raw)
    truth, bound = triton_bounds.matmul(x_TI, exact, weight.parts[0], residual_TO)
    return float(((found.double() - truth).abs() / bound).nan_to_num(torch.inf).max())


def main(asked: Sequence[str]) -> None:
    """The products asked for, or every quantised format's."""
    triton_matmul._few = Emulated(triton_matmul._few)
    triton_digits._digits = Emulated(triton_digits._digits)
    quantised = [name for name, planes in PLANES.items() if planes.quantised]
    for each in asked or [f"{name}:{tokens}:8" for name in quantised for tokens in (1, 16)]:
        name, tokens, cuts = each.split(":")
        triton_products.MOST_CUTS = int(cuts)
        share = error(name, int(tokens), 40, 2304)
        sys.stdout.write(json.dumps({"product": each, "share": share}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
