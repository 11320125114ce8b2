"""A model of 7B on one GPU: load, prefill and decode at growing contexts, in one stage.

    python -m bench.gpu [--layers 32] [--keep]        `make gpu-bench`
    TRITON_INTERPRET=1 python -m bench.gpu --tiny      does it run? its times mean nothing

The model has the shape of Llama-2-7B (32 layers, 32 heads of 128, no grouped queries) in Q4_K with
the output in Q6_K, of random weights, written to a temporary file. Keys and values of the context
are random numbers. Figures of a row:

    tok_s       decode: steps of one token, drawn greedily, by the clock; prefill: tokens of a chunk
    of_limit    bytes that must be read, weights and KV, over the card's copy bandwidth, of the time
    gpu_bytes   held in all after it
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from gguf import GGMLQuantizationType

from bench.gpu_kernels import Ceilings, describe_gpu
from bench.operands import raw_rows
from bench.report import Report
from sharding.batch import PAGE_SLOTS, Batch, Opened, SamplingParams, Segment
from sharding.gguf.reader import GGUFFile
from sharding.kernels.triton import choose_device
from sharding.stage import Stage
from sharding.stage_spec import StageSpec
from tests.tiny_gguf import bpe_vocabulary, file_head, padded, tensor_entry, text, typed_value

_steps = count()


@dataclass(frozen=True)
class Size:
    """Of the model and of what is measured."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    ffn: int = 11008
    vocab: int = 32000
    contexts: tuple[int, ...] = (2048, 4096, 16384, 32768, 65536)
    chunk: int = 4096
    decoded: int = 32


TINY = Size(2, 256, 4, 512, 320, (64, 300), 40, 2)


def write_model(path: Path, size: Size) -> None:
    """Matrix by matrix: the file is larger than what Python should hold at a time."""
    hidden, ffn = size.hidden, size.ffn
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }  # fmt: skip
    names: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (size.vocab, hidden), "Q4_K"),
        ("output_norm.weight", (hidden,), "F32"),
        ("output.weight", (size.vocab, hidden), "Q6_K"),
    ]
    for layer in range(size.layers):
        names += [(f"blk.{layer}.{n}.weight", (hidden,), "F32") for n in ("attn_norm", "ffn_norm")]
        names += [(f"blk.{layer}.{n}.weight", shape, "Q4_K") for n, shape in matrices.items()]
    metadata = bpe_vocabulary(size.vocab) | {
        "general.architecture": "llama",
        "llama.block_count": size.layers,
        "llama.context_length": max(size.contexts),
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": size.heads,
        "llama.attention.head_count_kv": size.heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": size.vocab,
    }
    made = {(shape, name) for _, shape, name in names}
    data = {each: padded(_values(*each)) for each in made}
    table, at = [], 0
    for name, shape, format_name in names:
        table.append(tensor_entry(name, shape[::-1], GGMLQuantizationType[format_name], at))
        at += len(data[shape, format_name])
    pairs = (text(key) + typed_value(value) for key, value in metadata.items())
    head = file_head(len(table), len(metadata)) + b"".join(pairs) + b"".join(table)
    with path.open("wb") as file:
        file.write(padded(head))
        for _, shape, format_name in names:
            file.write(data[shape, format_name])


def _values(shape: tuple[int, ...], format_name: str) -> bytes:
    if len(shape) == 1:
        return np.ones(shape, np.float32).tobytes()
    return raw_rows(format_name, (shape[0], shape[1])).tobytes()


class OneStage:
    """The whole model in one stage, with a request that owns all pages."""

    def __init__(self, file: GGUFFile, size: Size) -> None:
        pages = -(-max(size.contexts) // PAGE_SLOTS)
        spec = StageSpec(str(file.paths[0]), 0, size.layers, pages, "triton")
        begin = time.perf_counter()
        self.stage = Stage(spec, file)
        self._wait()
        self.load_s = time.perf_counter() - begin
        opened = Opened(1, list(range(pages)), 1, SamplingParams(temperature=0.0))
        self.stage.forward(Batch(next(_steps), opened=[opened]), None)
        for layer in self.stage._pages.layers:
            layer.k_PGDS.normal_()
            layer.v_PGSD.normal_()
        self._vocab = size.vocab

    def step_s(self, start: int, tokens: int, sample: bool) -> float:
        """The time of one batch: so many tokens from position `start` on."""
        ids = torch.randint(0, self._vocab, (tokens,)).tolist()
        batch = Batch(next(_steps), segments=[Segment(1, start, ids, sample)])
        begin = time.perf_counter()
        output = self.stage.forward(batch, None)
        self._wait()
        assert not output.segments or output.segments[0].error is None, output.segments
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.stage.kernels.device.type == "cuda":
            torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def measure(model: OneStage, size: Size, copy_gb_s: float) -> Iterator[dict[str, str | float]]:
    """Prefill of a chunk that ends a context, and decoding at it."""
    stage = model.stage
    kv_token = stage.kv_bytes / (len(stage._pages.layers[0].k_PGDS) * PAGE_SLOTS)
    for context in size.contexts:
        chunk = min(size.chunk, context)
        start = context - chunk
        model.step_s(start, chunk, sample=False)
        seconds = median([model.step_s(start, chunk, sample=False) for _ in range(3)])
        yield {"test": f"prefill {chunk} @ d{start}", "tok_s": chunk / seconds, "ms": seconds * 1e3}
        for _ in range(3):
            model.step_s(context - 1, 1, sample=True)
        steps = [model.step_s(context - 1, 1, sample=True) for _ in range(size.decoded)]
        seconds = median(steps)
        limit = (stage.weights_bytes + kv_token * context) / copy_gb_s / 1e9
        yield {
            "test": f"decode @ {context}",
            "tok_s": 1 / seconds,
            "ms": seconds * 1e3,
            "of_limit": limit / seconds,
        }


def main(
    layers: Annotated[int, typer.Option(help="Of the model.")] = 32,
    tiny: Annotated[bool, typer.Option(help="A tiny model, for the interpreter.")] = False,
    keep: Annotated[bool, typer.Option(help="Write results/gpu.json.")] = False,
) -> None:
    """Write a model, load it, run it."""
    size = TINY if tiny else Size(layers=layers)
    device = choose_device()
    report, about = Report("gpu", keep), describe_gpu(device)
    copy = Ceilings(device, tiny).copy_gb_s()

    def row(**figures: str | float) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        report.row(**rounded, gpu_bytes=held, copy_gb_s=round(copy), **about)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "model.gguf"
        write_model(path, size)
        with GGUFFile.open(path) as file:
            OneStage(file, Size(**(vars(TINY) | {"layers": 2})))  # compiles what loading needs
            model = OneStage(file, size)
            stage = model.stage
            row(
                test="load", s=model.load_s, file_bytes=path.stat().st_size,
                weights_bytes=stage.weights_bytes, kv_bytes=stage.kv_bytes,
            )  # fmt: skip
            for figures in measure(model, size, copy):
                row(**figures)


if __name__ == "__main__":
    typer.run(main)
