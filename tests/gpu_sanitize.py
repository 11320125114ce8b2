"""`make gpu-sanitize`: every GPU kernel once under compute-sanitizer, which finds accesses outside
of memory (memcheck) and unordered ones to shared memory (racecheck).

    python -m tests.gpu_sanitize [memcheck racecheck]     the first failing tool's status, or 0
    python -m tests.gpu_sanitize products|attention|stages   what they look at, alone

A kernel under it takes a hundred times as long, so shapes are small, with edges that no tile fills.
Whether results are right is not asked here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from sharding.batch import SamplingParams, Segment
from sharding.errors import LongspanError
from sharding.gguf.reader import GGUFFile
from sharding.kernels.planes import BLOCK, PLANES
from sharding.kernels.triton import TritonKernels, interpreted
from sharding.kernels.triton_prefix import Library
from sharding.model.kv_cache import LayerPages
from tests.sharding.kernels.world import (
    FORMAT_NAMES,
    Heads,
    file_of,
    index_of,
    normal,
    random_pages,
    random_raw,
)
from tests.stages import load_stages, logits, open_request
from tests.tiny_gguf import tiny_model

TOOLS = ("memcheck", "racecheck")
TOKENS = (1, 16, 17)
"""For every way that a product takes."""


def products() -> None:
    """In every format, with rows short of a tile, columns short of a block where the format allows
    it, and cuts short of blocks."""
    kernels = TritonKernels()
    for name in FORMAT_NAMES:
        cols = 2304 if PLANES[name].unit == BLOCK else 2304 + 32
        weight = kernels.pack(file_of(w=(name, random_raw(name, 70, cols))), ["w"])
        kernels.embed(weight, range(70))
        for tokens in TOKENS:
            x_TI = normal(tokens, cols).to(kernels.device)
            kernels.matmul(x_TI, weight, normal(tokens, 70).to(kernels.device))


def attention() -> None:
    """Decoded tokens, chunks and both, of heads of every size, with windows and long prefixes."""
    kernels = TritonKernels()
    if kernels.tiles.library is not None:
        kernels.tiles = replace(kernels.tiles, library=Library(48, 64, 256))
    for heads in (Heads(4, 2, 64), Heads(4, 4, 128), Heads(2, 1, 256), Heads(3, 1, 80)):
        host = random_pages(heads, 1100, requests=2)
        pages = LayerPages(host.k_PGDS.to(kernels.device), host.v_PGSD.to(kernels.device))
        width = (heads.heads + 2 * heads.kv_heads) * heads.dim
        for runs in ([(0, 1003, 1)], [(0, 700, 1), (1, 41, 70)], [(0, 900, 130)]):
            index = index_of(heads, runs, 1100).to(kernels.device)
            q_TX = kernels.rotate_and_store(
                normal(index.n_tokens, width).to(kernels.device), index, pages
            )
            for window in (0, 100):
                kernels.attention(q_TX, index, pages, window)


MODELS: tuple[dict[str, object], ...] = (
    {"quant": "Q4_K"},
    {"quant": "F16"},
    {"quant": "Q5_0", "family": "qwen2"},
    {
        "quant": "Q4_K",
        "family": "gemma3",
        "extra_metadata": {
            "gemma3.attention.sliding_window": 10,
            "gemma3.attention.sliding_window_pattern": 2,
        },
    },
)
"""Biases; norms of heads and results, and a window whose pages come round."""


def stages() -> None:
    """A prompt, tokens after it in a graph, one drawn at random."""
    for options in MODELS:
        data = tiny_model(layers=2, hidden=256, heads=4, kv_heads=2, ffn=512, **options)
        whole = load_stages(GGUFFile.from_bytes(data), 1, kernels="triton")
        open_request(whole, 1, [3, 1, 2], ring=2)
        for start, stop in ((0, 20), (20, 40)):
            logits(whole, [Segment(1, start, list(range(start, stop)))])
        for position in (40, 41):
            last_TV = logits(whole, [Segment(1, position, [7])])
        whole[0].kernels.draw(last_TV[0], SamplingParams(seed=1), 2, 1, None)


PARTS = {"products": products, "attention": attention, "stages": stages}


def run(part: str) -> None:
    """One of them, to its end on the GPU."""
    with torch.inference_mode():
        PARTS[part]()
        if not interpreted():
            torch.cuda.synchronize()


def sanitized(tool: str, part: str) -> int:
    """The status of compute-sanitizer, which says what it found."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    here = [sys.executable, "-m", "tests.gpu_sanitize", part]
    environment = dict(os.environ)
    if tool == "memcheck" and part != "stages":
        # Else memcheck sees what torch's allocator holds, not what it handed out; a graph needs it.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return subprocess.run([*command, *here], env=environment, check=False).returncode


def main(asked: Sequence[str]) -> int:
    """Run the tools asked for, or all."""
    if asked and asked[0] in PARTS:
        try:
            run(asked[0])
        except LongspanError as missing:
            sys.stderr.write(f"gpu-sanitize: nothing was looked at: {missing}\n")
            return 1
        return 0
    if shutil.which("compute-sanitizer") is None:
        sys.stderr.write("gpu-sanitize: compute-sanitizer is missing; CUDA's toolkit has it\n")
        return 1
    runs = [(tool, part) for tool in asked or TOOLS for part in PARTS]
    return next((status for each in runs if (status := sanitized(*each))), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
