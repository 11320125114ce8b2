"""How a 7B is packed at load: seconds, and how much memory beside the file's own pages.

    python -m bench.load [--threads 2]

One JSON line; `python -m bench.kernels --load --keep` keeps it among the others. A Q4_K_M file of
Llama-7B's shapes (4.1 GB) is written to a temporary folder, read once so that it lies in the page
cache, packed weight by weight in a process of its own, and deleted. `peak_anon_bytes` is the most
anonymous memory of that process, less what it had before; `ratio` is that over the file's bytes.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

import gguf
import numpy as np
import typer

from bench.operands import raw_rows
from sharding.gguf.reader import GGUFFile
from sharding.kernels import load_kernels, use_threads

_LAYERS, _HIDDEN, _FFN, _VOCAB = 32, 4096, 11008, 32000
_EVERY_S = 0.002
_READ_BYTES = 16 << 20


def q4_k_m_tensors() -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name, (rows, columns) and format, as llama.cpp's `Q4_K_M` chooses: Q6_K for the output and in
    half of the layers for values and the way down."""
    yield "token_embd.weight", (_VOCAB, _HIDDEN), "Q4_K"
    for layer in range(_LAYERS):
        better = "Q6_K" if layer % 2 else "Q4_K"
        for name, rows, cols, format in (
            ("attn_q", _HIDDEN, _HIDDEN, "Q4_K"),
            ("attn_k", _HIDDEN, _HIDDEN, "Q4_K"),
            ("attn_v", _HIDDEN, _HIDDEN, better),
            ("attn_output", _HIDDEN, _HIDDEN, "Q4_K"),
            ("ffn_gate", _FFN, _HIDDEN, "Q4_K"),
            ("ffn_up", _FFN, _HIDDEN, "Q4_K"),
            ("ffn_down", _HIDDEN, _FFN, better),
        ):
            yield f"blk.{layer}.{name}.weight", (rows, cols), format
    yield "output.weight", (_VOCAB, _HIDDEN), "Q6_K"


def weight_groups() -> Iterator[list[str]]:
    """The tensors of each weight, stacked as a block stacks them."""
    yield ["token_embd.weight"]
    for layer in range(_LAYERS):
        for parts in (
            ("attn_q", "attn_k", "attn_v"),
            ("attn_output",),
            ("ffn_gate", "ffn_up"),
            ("ffn_down",),
        ):
            yield [f"blk.{layer}.{part}.weight" for part in parts]
    yield ["output.weight"]


def write_model(path: Path) -> None:
    """Write the file; tensors of one shape and format have the same bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    tensors = list(q4_k_m_tensors())
    made = {(shape, format): raw_rows(format, shape) for _, shape, format in tensors}
    for name, shape, format in tensors:
        kind = gguf.GGMLQuantizationType[format]
        raw = made[shape, format]
        writer.add_tensor_info(name, raw.shape, raw.dtype, raw.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, format in tensors:
        writer.write_tensor_data(made[shape, format])
    writer.close()


def load_figures(threads: int) -> dict[str, float]:
    """Write a file, pack it in a child process, delete it; the child's figures."""
    with tempfile.TemporaryDirectory(prefix="longspan-load-") as folder:
        path = Path(folder) / "7b.Q4_K_M.gguf"
        write_model(path)
        command = [sys.executable, "-m", "bench.load", "--threads", str(threads)]
        done = subprocess.run([*command, "--model", str(path)], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def pack_figures(path: Path, threads: int) -> dict[str, float]:
    """Pack every matrix of a file in this process, as a stage's load does."""
    kernels = load_kernels("cpu")
    use_threads(threads, "cpu")
    with path.open("rb") as file:
        while file.read(_READ_BYTES):
            pass
    touch_memory(path.stat().st_size)
    watch = AnonymousMemory()
    with watch, GGUFFile.open(path) as model:
        begin = time.perf_counter()
        weights = [kernels.pack(model, names) for names in weight_groups()]
        spent = time.perf_counter() - begin
        file_bytes = model.size_bytes
    return {
        "load_s": round(spent, 3),
        "gb_s": round(file_bytes / spent / 1e9, 2),
        "packed_bytes": sum(weight.n_bytes for weight in weights),
        "peak_anon_bytes": watch.peak_bytes,
        "file_bytes": file_bytes,
        "ratio": round(watch.peak_bytes / file_bytes, 4),
    }


def touch_memory(size_bytes: int) -> None:
    """Write a byte to every page of so much memory, and free it.

    A virtual machine's memory costs its host a fault when it is first used after a while: 5 s for
    4 GiB on the machine of `results/`, 0.25 s once that is paid. It is no part of loading.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, size_bytes, flags=flags) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


class AnonymousMemory:
    """While entered, `peak_bytes` is the most `RssAnon` of this process, less that at the start."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._start_bytes = _anonymous_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes() - self._start_bytes)


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(kib) << 10


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    model: Annotated[Path | None, typer.Option(help="Pack this file here, write none.")] = None,
) -> None:
    """Measure, or do the child's part."""
    found = load_figures(threads) if model is None else pack_figures(model, threads)
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
