"""What Triton's compiler makes of the GPU kernels. Needs no GPU: it compiles for one by name.

    python -m bench.triton_code [--capability 90] [--only few] [--keep]

Figures of a row:

    registers, shared_bytes   of a thread, of a program; 255 registers are the most there are
    spilled_bytes             what did not fit into registers, of a thread
    instructions              in all, of a thread's one pass over its code
    instructions_a_weight     the same over the weights that it meets in one pass, where it does;
                              what lies outside the loop is counted as well
    wide_loads                of 16 bytes; narrow_loads, of 4 bytes and less, are slow in a loop
    products                  matrix instructions
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bench.report import Report
from sharding.kernels import (
    triton_attention,
    triton_digits,
    triton_gemm,
    triton_matmul,
    triton_plan,
    triton_prefix,
    triton_products,
    triton_rows,
)
from sharding.kernels.planes import BLOCK, FLOAT_COLUMNS, PLANES, Planes

Constants = dict[str, int | bool | str]
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_CUTS = 8  # of a matrix of 4096 rows
_FLOATS = {"eps", "scale", "factor"}
# Integers that are multiples of 16 in models of any size; Triton compiles for that. It also makes a
# constant of an integer that is 1.
_EVEN = {"cols", "padded", "rows", "width", "y_cols"}


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it is compiled for: pointers' types, constants, warps. `weights` are met in
    one pass over its loop."""

    name: str
    function: Any
    pointers: dict[str, str]
    constants: Constants
    warps: int = 4
    weights: int = 0
    stages: int = 3

    def compile(self, capability: int) -> CompiledKernel:
        """For a GPU of that compute capability, as 90 for 9.0."""
        signature: dict[str, str] = {}
        hints: dict[tuple[int, ...], list[list[str | int]]] = {}
        for number, name in enumerate(self.function.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            if name in self.pointers:
                signature[name] = "*" + self.pointers[name]
            else:
                signature[name] = "fp32" if name in _FLOATS else "i32"
            if name in self.pointers or name in _EVEN:
                hints[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.function, signature, self.constants, hints)
        target = GPUTarget("cuda", capability, 32)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=target, options=options)


def products() -> Iterator[Kernel]:
    """The ways of a product, in every format."""
    tiles = triton_products.Tiles()
    pointers = {"x": "fp32", "factors": "fp32", "y": "fp32", "residual": "fp32"}
    pointers |= {"partials": "fp32", "counters": "i32", "digits": "i32"}
    pointers |= {"halves": "fp16", "codes": "i8", "ids": "i64", "out": "fp16"}
    names = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
    for name, planes in PLANES.items():
        if planes.quantised:
            pointers |= {"low": "i32", "high": "i32", "scales": "i32"}
            pointers |= {"units": "i32" if planes.minimum else "fp16"}
        else:
            pointers |= {"low": names[planes.kind]}
        for tokens in (1, 16):
            size: Constants = {"RESIDUAL": True}
            if planes.quantised:
                size |= {"ROWS": tiles.rows, "N": 4 * max(2, tokens)} | _format(planes)
                size |= {"CUTS": _CUTS}
                function, warps, stages = triton_matmul._few, _CUTS, 1
                weights = tiles.rows * BLOCK * _CUTS
            else:
                size |= {"ROWS": tiles.float_rows, "N": 2 * max(4, tokens)}
                size |= {"EXACT": planes.kind == "f16"}
                function, warps, stages = triton_matmul._few_floats, 2, 3
                weights = tiles.float_rows * FLOAT_COLUMNS
            yield Kernel(
                f"few {name} T{tokens}", function, dict(pointers), size, warps, weights, stages
            )
        if planes.quantised:
            size = {"GATHER": False, "ROWS": tiles.spread_rows, **_format(planes)}
            weights = tiles.spread_rows * BLOCK
            yield Kernel(f"spread {name}", triton_gemm._spread, dict(pointers), size, 1, weights)


def _format(planes: Planes) -> Constants:
    keys = ("ASM", "LOW", "HIGH", "PLACE", "GROUP", "SCALED", "MINIMUM", "CODED")
    return dict(zip(keys, triton_products.constants(planes), strict=True))


def attentions() -> Iterator[Kernel]:
    """Of heads of 64, 128 and 256, few rows and chunks."""
    tiles = triton_plan.Tiles()
    pointers = {
        "q": "fp32",
        "keys": "fp16",
        "values": "fp16",
        "y": "fp32",
        "partials": "fp32",
        "prior": "fp16",
        "prior_logs": "fp32",
        "items": "i32",
        "tables": "i64",
        "rows": "i32",
    }
    yield Kernel(
        "round_queries",
        triton_attention._round_queries,
        {"q": "fp32", "out": "fp16"},
        {"SIZE": 4096},
    )
    for dim in (64, 128, 256):
        head: Constants = {"DIM": dim, "DIMS": dim}
        function = triton_attention._attend
        tile = tiles.of(dim, fine=True)
        for rows in sorted({16, triton_plan.fine_rows(dim)}):
            size: Constants = {"ROWS": rows, "SLOTS": tile.slots}
            size |= {"FINE": True, "PRIOR": False}
            name = f"attention D{dim}, {rows} rows"
            yield Kernel(name, function, pointers, head | size, tile.warps, stages=tile.stages)
        tile = tiles.of(dim, fine=False)
        size = {"ROWS": tile.rows, "SLOTS": tile.slots, "FINE": False, "PRIOR": True}
        name, rounded = f"attention D{dim}, a chunk", pointers | {"q": "fp16"}
        yield Kernel(name, function, rounded, head | size, tile.warps, stages=tile.stages)
        pointers_of_pages = pointers | {"k": "fp16", "v": "fp16", "table": "i64"}
        yield Kernel(f"gather D{dim}", triton_prefix._gather, pointers_of_pages, head, 1)
        yield Kernel(
            f"merge D{dim}",
            triton_attention._merge,
            pointers,
            head | {"HEADS": triton_attention.heads_merged(dim), "PARTS": triton_attention.MERGED},
        )


def rows() -> Iterator[Kernel]:
    """The kernels that take a row at a time."""
    x, y = {"x": "fp32"}, {"y": "fp32"}
    normed = x | y | {"scale": "fp32", "residual": "fp32"}
    for added in (False, True):
        name = "rms_norm and residual" if added else "rms_norm"
        yield Kernel(name, triton_rows._rms_norm, normed, {"WIDTH": 4096, "ADDED": added})
    of_one: Constants = {"WIDTH": 16, "width": 1, "ADDED": False}
    yield Kernel("rms_norm of one", triton_rows._rms_norm, normed, of_one)
    for activation in ("silu", "gelu"):
        gate: Constants = {"WIDTH": 2048, "GELU": activation == "gelu"}
        yield Kernel(f"gated {activation}", triton_rows._gated, {"gate_up": "fp32"} | y, gate)
    for name, adjacent, biased, headed in (
        ("halves", False, False, False),
        ("adjacent", True, False, False),
        ("halves, bias", False, True, False),
        ("halves, norms", False, False, True),
    ):
        yield Kernel(
            f"rotate_and_store {name}",
            triton_rows._rotate_and_store,
            {
                "qkv": "fp32", "bias": "fp32", "q_norm": "fp32", "k_norm": "fp32", "q": "fp32",
                "keys": "fp16", "values": "fp16", "cos": "fp32", "sin": "fp32", "pages": "i64",
                "slots": "i64",
            },
            {
                "PAIRS": 64, "DIM": 128, "DIMS": 128, "ADJACENT": adjacent, "BIASED": biased,
                "NORMED": headed,
            },
        )  # fmt: skip
    yield Kernel(
        "draw",
        triton_rows._race,
        {"scaled": "fp64", "best": "fp64", "ids": "i32", "seed": "i64", "position": "i64"},
        {"SIZE": triton_rows.DRAW_BLOCK},
    )


def activations() -> Iterator[Kernel]:
    """The kernels that make what products take: digits and halves; what finishes a product."""
    x = {"x": "fp32"}
    digits = {"digits": "i8", "factors": "fp32"}
    size: Constants = {"N": 8, "BLOCKS": triton_products.Tiles().blocks}
    yield Kernel("digits", triton_digits._digits, x | digits, size)
    of_norm = x | {"scale": "fp32"} | digits
    yield Kernel("digits of norm", triton_digits._norm_digits, of_norm, size | {"WIDTH": 4096})
    gated = {"gate_up": "fp32"} | digits
    for activation in ("silu", "gelu"):
        name, how = f"digits of gate, {activation}", {"GELU": activation == "gelu"}
        yield Kernel(name, triton_digits._gate_digits, gated, size | how)
    parts = {"partials": "fp32", "rows": "i32"} | digits
    for dim in (64, 128, 256):
        merged: Constants = {"N": 8, "DIM": dim, "PARTS": triton_attention.MERGED}
        yield Kernel(f"digits of parts D{dim}", triton_digits._merge_digits, parts, merged)
    halves = {"out": "fp16", "factors": "fp32"}
    columns = triton_products.Tiles().columns
    of_eight: Constants = {"N": 8, "COLUMNS": columns}
    yield Kernel("halves", triton_matmul._halves, x | halves, of_eight, 8)
    yield Kernel("halve", triton_gemm._halve, x | halves, {"COLUMNS": 1024})
    yield Kernel(
        "finish",
        triton_gemm._finish,
        {"product": "fp32", "y": "fp32", "residual": "fp32", "factors": "fp32"},
        {"COLUMNS": 1024, "RESIDUAL": True},
    )


def figures(compiled: CompiledKernel) -> dict[str, int]:
    """A row's figures, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _tool("nvdisasm", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", code)
    loads = [name for name in names if name.startswith(("LDG", "LDGSTS"))]
    return {
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]),
        "shared_bytes": int(compiled.metadata.shared),
        "instructions": len(names) - names.count("NOP"),
        "wide_loads": sum(name.endswith(".128") for name in loads),
        "narrow_loads": sum(not name.endswith((".128", ".64")) for name in loads),
        "products": sum(name.startswith(("HMMA", "HGMMA", "IMMA")) for name in names),
    }


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(
    capability: Annotated[int, typer.Option(help="Of the GPU, as 90 for 9.0.")] = 90,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name has this.")] = None,
    keep: Annotated[bool, typer.Option(help="Write results/triton_code.json.")] = False,
) -> None:
    """Compile every kernel and look at the code."""
    report = Report("triton_code", keep)
    for kernel in (*products(), *attentions(), *rows(), *activations()):
        if not only or any(part in kernel.name for part in only):
            found: dict[str, float] = dict(figures(kernel.compile(capability)))
            if kernel.weights:
                share = kernel.weights / (32 * kernel.warps)
                found["instructions_a_weight"] = round(found["instructions"] / share, 2)
            report.row(test=kernel.name, capability=capability, triton=triton.__version__, **found)


if __name__ == "__main__":
    typer.run(main)
