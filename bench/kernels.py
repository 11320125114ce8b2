"""The compiled kernels one by one, each against what the machine can do at that moment.

    python -m bench.kernels [--threads 2] [--instruction-set avx512] [--only Q4_K] [--load] [--keep]

Figures of a row, all from best times:

    us              of one call
    g_weights_s     weights met, in 1e9 a second (once a call, however many tokens)
    gb_s            bytes that must be read (weights as packed, KV up to the position, activations)
    gflop_s         two for each multiplication and addition; attention's exponentials do not count
    read_gb_s       what reading memory reaches, the faster of two ways, measured in turn
    gemm_gflop_s    torch's float32 GEMM 512 x 2048 x 2048, likewise
    of_memory       gb_s / read_gb_s
    of_gemm         gflop_s / gemm_gflop_s
    time_vs_q4_1    time a weight over Q4_1's in the same shape, measured in turn (one token only)
    others_cores    cores that others kept busy meanwhile; a row with 0.2 is better measured again

One and a few tokens cycle through copies of their weights (KV), more than 200 MB together, so that
they come from memory as in a model. 512 tokens use one copy, and what is not a matrix or KV may lie
in a cache. The Python around a call is included. On a quiet machine all rows take three minutes.
`--load` adds how a 7B is packed at load (see `bench/load.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer

from bench.ceilings import Ceilings, Neighbours, Sample, best_times
from bench.load import load_figures
from bench.operands import (
    COMPUTED,
    Heads,
    Shape,
    copies_for,
    filled_layers,
    one_request,
    packed_copies,
)
from bench.report import Report
from sharding.batch import SamplingParams
from sharding.kernels import use_threads
from sharding.kernels.cpu import INSTRUCTION_SETS, CPUKernels
from sharding.model.sampling import History

DEPTH = 4096
BIG: Shape = (11008, 4096)
MODELS: dict[str, Sequence[tuple[str, Shape]]] = {
    "SmolLM2-135M": [("Q4_1", s) for s in ((960, 576), (576, 576), (3072, 576), (576, 1536))],
    # Rows of 640 hold no units of 256, so these tensors of a Q4_K_M file are Q5_0 and Q8_0.
    "Gemma-3-270M": [
        ("Q5_0", (1536, 640)),
        ("Q4_K", (640, 1024)),
        ("Q5_0", (4096, 640)),
        ("Q4_K", (640, 2048)),
        ("Q6_K", (640, 2048)),
        ("Q8_0", (262144, 640)),
    ],
}
HEADS: dict[str, Heads] = {
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-7B": (32, 32, 128),
}
VOCABULARIES = (49152, 262144)  # SmolLM2's, Gemma's
DRAWS: dict[str, SamplingParams] = {
    "temperature 1": SamplingParams(seed=1),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "top_k 40, top_p 0.95": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1),
    "repetition penalty": SamplingParams(temperature=0.8, repetition_penalty=1.1, seed=1),
}


@dataclass(frozen=True)
class Work:
    """Calls that do the same on different memory, and what one of them reads and computes."""

    calls: Sequence[Sample]
    n_bytes: int
    flops: int = 0
    weights: int = 0


@dataclass(frozen=True)
class Case:
    """One row: how it is called, what else it says, and its work, built when its turn comes.

    `baseline`: the same with Q4_1, to compare with.
    """

    test: str
    about: dict[str, str | int]
    build: Callable[[], Work]
    baseline: Callable[[], Work] | None = None


def figures(work: Work, call_s: float, read_gb_s: float, gemm_gflop_s: float) -> dict[str, float]:
    """A row's figures; those of things that the kernel does not do are left out."""
    gb_s, gflop_s = work.n_bytes / call_s / 1e9, work.flops / call_s / 1e9
    found = {"us": call_s * 1e6, "gb_s": gb_s, "of_memory": gb_s / read_gb_s}
    if work.weights:
        found["g_weights_s"] = work.weights / call_s / 1e9
    if work.flops:
        found |= {"gflop_s": gflop_s, "of_gemm": gflop_s / gemm_gflop_s}
    return found | {"read_gb_s": read_gb_s, "gemm_gflop_s": gemm_gflop_s}


class Cases:
    """The rows to measure, on one kernel set."""

    def __init__(self, kernels: CPUKernels) -> None:
        self._kernels = kernels

    def all(self) -> Iterator[Case]:
        """Every row, those of one format one after the other: they share its copies."""
        for format in COMPUTED:
            batches = (1, 2, 4, 8, 512) if format in ("Q4_1", "Q4_K") else (1, 512)
            for tokens in batches:
                yield self._matmul("", format, BIG, tokens)
        for model, matrices in MODELS.items():
            for format, shape in matrices:
                for tokens in (1, 512) if shape[0] < 1 << 16 else (1,):
                    yield self._matmul(f"{model} ", format, shape, tokens)
        for model, heads in HEADS.items():
            for tokens in (1, 512):
                yield self._attention(model, heads, tokens)
        for tokens in (1, 512):
            yield from self._pointwise(tokens)
        for vocab in VOCABULARIES:
            yield from self._draws(vocab)

    def _matmul(self, model: str, format: str, shape: Shape, tokens: int) -> Case:
        rows, cols = shape
        about: dict[str, str | int] = {"format": format, "rows": rows, "cols": cols}
        return Case(
            f"{model}matmul {format} {rows}x{cols} T{tokens}",
            about | {"tokens": tokens},
            partial(self._matmul_work, format, shape, tokens),
            partial(self._matmul_work, "Q4_1", shape, 1) if tokens == 1 else None,
        )

    def _matmul_work(self, format: str, shape: Shape, tokens: int) -> Work:
        weights = packed_copies(self._kernels, format, shape)
        x_TI = torch.randn(tokens, shape[1])
        calls = [partial(self._kernels.matmul, x_TI, weight) for weight in weights]
        count = shape[0] * shape[1]
        n_bytes = weights[0].n_bytes + x_TI.nbytes
        return Work(calls if tokens < 100 else calls[:1], n_bytes, 2 * count * tokens, count)

    def _attention(self, model: str, heads: Heads, tokens: int) -> Case:
        queries, groups, dim = heads
        about: dict[str, str | int] = {"heads": queries, "kv_heads": groups, "head_dim": dim}
        return Case(
            f"{model} attention T{tokens} @ d{DEPTH}",
            about | {"depth": DEPTH, "tokens": tokens},
            partial(self._attention_work, heads, tokens),
        )

    def _attention_work(self, heads: Heads, tokens: int) -> Work:
        queries, groups, dim = heads
        kv_bytes = (DEPTH + tokens) * groups * dim * 4
        layers = filled_layers(copies_for(kv_bytes) if tokens == 1 else 1, heads, DEPTH + tokens)
        index = one_request(heads, DEPTH, tokens)
        q_TX = torch.randn(tokens, queries * dim)
        calls = [partial(self._kernels.attention, q_TX, index, pages) for pages in layers]
        seen = sum(range(DEPTH + 1, DEPTH + tokens + 1))
        return Work(calls, kv_bytes + q_TX.nbytes, 4 * queries * dim * seen)

    def _pointwise(self, tokens: int) -> Iterator[Case]:
        about: dict[str, str | int] = {"tokens": tokens}
        for name, build in (
            ("rms_norm 4096", self._norm_work),
            ("gated_silu 11008", self._silu_work),
            ("rotate_and_store 32/8/128", self._rotate_work),
            ("embed Q4_K 32000x4096", self._embed_work),
        ):
            yield Case(f"{name} T{tokens}", about, partial(build, tokens))

    def _draws(self, vocab: int) -> Iterator[Case]:
        about: dict[str, str | int] = {"vocab": vocab}
        for name, params in DRAWS.items():
            yield Case(f"draw, {name}, of {vocab}", about, partial(self._draw_work, vocab, params))
        yield Case(f"logprobs of {vocab}", about, partial(self._score_work, vocab))

    def _draw_work(self, vocab: int, params: SamplingParams) -> Work:
        logits_V, history = _peaked(vocab), History(vocab)
        history.add_prompt(list(range(1000)))
        calls = [
            partial(self._kernels.draw, logits_V, params, position, 1, history)
            for position in range(16)
        ]
        return Work(calls, logits_V.nbytes)

    def _score_work(self, vocab: int) -> Work:
        logits_V = _peaked(vocab)
        return Work([partial(self._kernels.score, logits_V[None], [7], 5)], logits_V.nbytes)

    def _norm_work(self, tokens: int) -> Work:
        x_TI, scale_I = torch.randn(tokens, 4096), torch.ones(4096)
        return Work([partial(self._kernels.rms_norm, x_TI, scale_I, 1e-5)], x_TI.nbytes)

    def _silu_work(self, tokens: int) -> Work:
        x_T2F = torch.randn(tokens, 2 * 11008)
        return Work([partial(self._kernels.gated, x_T2F)], x_T2F.nbytes)

    def _rotate_work(self, tokens: int) -> Work:
        heads = HEADS["Llama-3-8B"]
        (pages,), index = filled_layers(1, heads, tokens), one_request(heads, 0, tokens)
        qkv_TX = torch.randn(tokens, (32 + 2 * 8) * 128)
        return Work([partial(self._kernels.rotate_and_store, qkv_TX, index, pages)], qkv_TX.nbytes)

    def _embed_work(self, tokens: int) -> Work:
        weights = packed_copies(self._kernels, "Q4_K", (32000, 4096))
        ids = torch.randint(32000, (tokens,)).tolist()
        calls = [partial(self._kernels.embed, weight, ids) for weight in weights]
        return Work(calls, tokens * weights[0].n_bytes // weights[0].rows)


def _peaked(vocab: int) -> torch.Tensor:
    """Logits as models have them: a few stand out of what is nearly normally distributed."""
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2.5
    logits_V[::997] += 8
    return logits_V


def measured(work: Work, ceilings: Ceilings, baseline: Work | None) -> dict[str, float]:
    """A row's figures, with both ceilings and the baseline measured in turn with it."""
    samples: list[Sample] = [*ceilings.reads, ceilings.gemm, partial(_cycle, work)]
    if baseline is not None:
        samples.append(partial(_cycle, baseline))
    neighbours = Neighbours()
    one_s, several_s, gemm_s, cycle_s, *rest = best_times(samples)
    others = round(neighbours.cores(), 2)
    call_s = cycle_s / len(work.calls)
    read_gb_s = ceilings.read_bytes / min(one_s, several_s) / 1e9
    gemm_gflop_s = ceilings.gemm_flops / gemm_s / 1e9
    row = figures(work, call_s, read_gb_s, gemm_gflop_s)
    if baseline is not None:
        base_s = rest[0] / len(baseline.calls)
        row["time_vs_q4_1"] = (call_s / work.weights) / (base_s / baseline.weights)
    return row | {"others_cores": others}


def _cycle(work: Work) -> None:
    for call in work.calls:
        call()


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    instruction_set: Annotated[str, typer.Option(help="; ".join(INSTRUCTION_SETS))] = (
        INSTRUCTION_SETS[0]
    ),
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
    load: Annotated[bool, typer.Option(help="Also pack a 7B; writes a file of 4 GB.")] = False,
    keep: Annotated[bool, typer.Option(help="Write results/kernels-SET.json.")] = False,
) -> None:
    """Measure every kernel."""
    report = Report("kernels", keep, instruction_set)
    use_threads(threads, "cpu")
    ceilings = Ceilings(threads)
    common: dict[str, str | int] = {"instruction_set": instruction_set, "threads": threads}
    with torch.inference_mode():
        for case in Cases(CPUKernels(instruction_set)).all():
            if only in case.test:
                baseline = None if case.baseline is None else case.baseline()
                row = measured(case.build(), ceilings, baseline)
                report.row(test=case.test, **case.about, **common, **rounded(row))
    if load:
        report.row(test="load 7B Q4_K_M", **common, **load_figures(threads))


def rounded(row: dict[str, float]) -> dict[str, float]:
    """Four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}


if __name__ == "__main__":
    typer.run(main)
