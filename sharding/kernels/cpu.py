"""The compiled kernels for CPUs: quantised weights repacked once, C++ for AVX-512, AVX2 or any
processor.

Not here: the arithmetic (`csrc/`, bounds in docs/numerics.md). This file checks what the C++ trusts
and passes addresses. Weights stay quantised: 2% more bytes than the file has, at most 4%.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sharding.batch import PAGE_SLOTS, Choice
from sharding.errors import COMPUTING_FAILED, ConfigError
from sharding.kernels.block_weights import PLAIN_HEADS

try:
    from sharding.kernels import _cpu
except ImportError as missing:
    raise ConfigError(
        f"the compiled CPU kernels are not installed here ({missing}); install Longspan where a "
        "C++ compiler is, or choose --kernels reference"
    ) from missing
from sharding.kernels.cpu_weights import native_feed_forward, native_weight, pack, pack_experts
from sharding.model.sampling import banned, draw, score

if TYPE_CHECKING:
    from sharding.batch import SamplingParams
    from sharding.gguf.reader import GGUFFile
    from sharding.kernels import Weight
    from sharding.kernels.block_weights import BlockWeights, ExpertWeights, HeadWeights
    from sharding.model.arch import Activation
    from sharding.model.attention import BatchIndex, Rows
    from sharding.model.kv_cache import LayerPages
    from sharding.model.sampling import History

INSTRUCTION_SETS: tuple[str, ...] = tuple(_cpu.instruction_sets())
"""What this processor runs, fastest first; `portable` is always among them."""


# What glibc's fixed set of cores holds.
_MOST_CORES = 1024


class CPUKernels:
    """See the contract in `sharding/kernels/__init__.py`.

    `instruction_set` is one of `INSTRUCTION_SETS`. Each packs weights in its own order.
    """

    name = "cpu"
    failures = COMPUTING_FAILED
    device = torch.device("cpu")

    def __init__(self, instruction_set: str = INSTRUCTION_SETS[0]) -> None:
        self.instruction_set = instruction_set
        self.native = _cpu.Kernels(instruction_set)

    def pack(self, file: GGUFFile, names: Sequence[str]) -> Weight:
        """Repack straight from the mapped file, panel by panel on all threads."""
        return pack(self.native, file, names)

    def pack_experts(self, file: GGUFFile, names: Sequence[str]) -> Sequence[Weight]:
        """A weight of its own for each expert: of those that no token takes nothing is read."""
        return pack_experts(self.native, file, names)

    def embed(
        self, weight: Weight, ids: Sequence[int], out_TI: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One row of the packed panel that holds it."""
        y_TI = torch.empty(len(ids), weight.cols) if out_TI is None else out_TI
        assert y_TI.shape == (len(ids), weight.cols), y_TI.shape
        self.native.embed(native_weight(weight), ids, _address(y_TI))
        return y_TI

    def matmul(
        self, x_TI: torch.Tensor, weight: Weight, residual_TO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Every output is reduced column by column, whatever T is."""
        tokens, cols = x_TI.shape
        assert cols == weight.cols, (cols, weight.cols)
        y_TO = torch.empty(tokens, weight.rows)
        residual = 0
        if residual_TO is not None:
            assert residual_TO.shape == y_TO.shape, residual_TO.shape
            residual = _address(residual_TO)
        self.native.matmul(_address(x_TI), tokens, native_weight(weight), residual, y_TO.data_ptr())
        return y_TO

    def rms_norm(
        self,
        x_TI: torch.Tensor,
        scale_I: torch.Tensor,
        eps: float,
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sixteen running sums of squares, added up in a fixed tree."""
        tokens, width = x_TI.shape
        assert len(scale_I) == width, scale_I.shape
        assert residual_TI is None or residual_TI.shape == x_TI.shape, residual_TI.shape
        y_TI = torch.empty(tokens, width)
        scale, residual = _address(scale_I), _address_if(residual_TI)
        self.native.rms_norm(_address(x_TI), tokens, width, scale, eps, residual, y_TI.data_ptr())
        return y_TI

    def rotate_and_store(
        self,
        qkv_TX: torch.Tensor,
        index: BatchIndex,
        pages: LayerPages,
        heads: HeadWeights = PLAIN_HEADS,
    ) -> torch.Tensor:
        """Pages are written in place."""
        tokens, width = qkv_TX.shape
        queries = width // pages.head_dim - 2 * pages.kv_heads
        assert width % pages.head_dim == 0 and tokens == index.n_tokens, qkv_TX.shape
        assert 2 * index.rope.turning <= pages.head_dim, index.rope.turning
        q_TX = torch.empty(tokens, queries * pages.head_dim)
        batch, native = _native_batch(index), _native_pages(queries, pages)
        own = _native_heads(heads, width, pages.head_dim)
        self.native.rotate_and_store(
            _address(qkv_TX), own, heads.rotation, batch, native, q_TX.data_ptr()
        )
        return q_TX

    def attention(
        self, q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int = 0
    ) -> torch.Tensor:
        """Blocks of 256 slots, merged in order."""
        tokens, width = q_TX.shape
        heads = width // pages.head_dim
        assert heads * pages.head_dim == width and tokens == index.n_tokens, q_TX.shape
        y_TX = torch.empty(tokens, width)
        batch, native = _native_batch(index), _native_pages(heads, pages)
        self.native.attention(_address(q_TX), batch, native, window, y_TX.data_ptr())
        return y_TX

    def gated(self, gate_up_T2F: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """The first half of the columns is the gate."""
        tokens, width = gate_up_T2F.shape
        y_TF = torch.empty(tokens, width // 2)
        how = _cpu.Activation[activation]
        self.native.gated(_address(gate_up_T2F), tokens, width // 2, how, y_TF.data_ptr())
        return y_TF

    def mix_experts(
        self,
        x_TI: torch.Tensor,
        experts: ExpertWeights,
        activation: Activation = "silu",
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens grouped by expert; few of them on one thread, many on all."""
        assert x_TI.shape[1] == experts.router.cols, x_TI.shape
        assert residual_TI is None or residual_TI.shape == x_TI.shape, residual_TI.shape
        y_TI = torch.empty_like(x_TI)
        self.native.mix_experts(
            _address(x_TI),
            len(x_TI),
            native_feed_forward(experts),
            _cpu.Activation[activation],
            _address_if(residual_TI),
            y_TI.data_ptr(),
        )
        return y_TI

    def draw(
        self,
        logits_V: torch.Tensor,
        params: SamplingParams,
        position: int,
        drawn: int,
        history: History | None,
    ) -> int:
        """Without a tensor in between: of a large vocabulary those cost more than a small model."""
        assert logits_V.ndim == 1, logits_V.shape
        seen = counts = 0
        if params.needs_history:
            assert history is not None, "penalties need a history"
            seen_V, counts_V = history.seen_V, history.output_counts_V
            assert len(seen_V) == len(counts_V) == len(logits_V), len(seen_V)
            assert seen_V.dtype == torch.bool and counts_V.dtype == torch.float32
            seen, counts = seen_V.data_ptr(), counts_V.data_ptr()
        token = self.native.draw(
            _address(logits_V),
            len(logits_V),
            (params.temperature, params.top_k, params.top_p, params.min_p),
            (params.repetition_penalty, params.presence_penalty, params.frequency_penalty),
            seen,
            counts,
            tuple(params.logit_bias),
            tuple(params.logit_bias.values()),
            banned(params, drawn),
            params.seed % (1 << 64),
            position,
        )
        if token >= 0:
            return token
        found = draw(logits_V, params, position, drawn, history)  # raises what is wrong
        raise RuntimeError(f"the kernels refuse to draw token {found} at position {position}")

    def score(
        self, logits_TV: torch.Tensor, targets: Sequence[int], alternatives: int
    ) -> list[Choice]:
        """Row by row: one pass for the sum, one for the likeliest."""
        assert len(logits_TV) == len(targets), logits_TV.shape
        vocab, row = logits_TV.shape[1], 4 * logits_TV.shape[1]
        first, choices = _address(logits_TV), []
        for number, token in enumerate(targets):
            found = self.native.score(first + number * row, vocab, token, alternatives)
            if not found:
                score(logits_TV, targets, alternatives)  # raises what is wrong
                raise RuntimeError(f"the kernels refuse to score row {number}")
            choices.append(Choice(*found[0], found[1:]))
        return choices

    def works(self) -> bool:
        """A processor that fails takes the process with it."""
        return True

    def layers(self, weights: Sequence[BlockWeights], pages: Sequence[LayerPages]) -> CPULayers:
        """One call for all blocks."""
        return CPULayers(self, weights, pages)

    def head(self, norm_I: torch.Tensor, eps: float, weight: Weight) -> CPUHead:
        """One call for both steps, and for the choice of a token."""
        return CPUHead(self, norm_I, eps, weight)


class CPULayers:
    """`Layers` that run in one call."""

    def __init__(
        self, kernels: CPUKernels, weights: Sequence[BlockWeights], pages: Sequence[LayerPages]
    ) -> None:
        # The C++ keeps addresses; these keep what lies there.
        self._kept = tuple(weights), tuple(pages)
        self._hidden = weights[0].qkv.cols
        self._layers = _cpu.Layers(kernels.native)
        for block, held in zip(weights, pages, strict=True):
            self._append(block, held)

    def _append(self, block: BlockWeights, pages: LayerPages) -> None:
        hidden, heads = self._hidden, block.attn_output.cols // pages.head_dim
        assert block.qkv.cols == block.attn_output.rows == hidden, block.qkv.cols
        assert block.qkv.rows == (heads + 2 * pages.kv_heads) * pages.head_dim, block.qkv.rows
        norms = (block.attn_norm_I, block.ffn_norm_I, block.attn_post_norm_I, block.ffn_post_norm_I)
        assert all(norm is None or len(norm) == hidden for norm in norms), norms
        self._layers.append(
            [_address_if(norm) for norm in norms],
            block.eps,
            native_weight(block.qkv),
            native_weight(block.attn_output),
            native_feed_forward(block.feed_forward),
            _native_pages(heads, pages),
            block.window,
            _native_heads(block.heads, block.qkv.rows, pages.head_dim),
            block.heads.rotation,
            _cpu.Activation[block.activation],
        )

    def run(
        self, x_TI: torch.Tensor, index: BatchIndex, wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """In place."""
        assert x_TI.shape == (index.n_tokens, self._hidden), x_TI.shape
        assert 2 * index.rope.turning <= self._kept[1][0].head_dim, index.rope.turning
        x, batch = _address(x_TI), _native_batch(index)
        if wanted is None:
            self._layers.run(x, batch, x)
            return x_TI
        rows = list(wanted)
        assert rows == sorted(set(rows)) and all(0 <= row < len(x_TI) for row in rows), rows
        self._layers.run_wanted(x, batch, rows, x)
        return x_TI[: len(rows)]


class CPUHead:
    """`Head` in one call."""

    def __init__(
        self, kernels: CPUKernels, norm_I: torch.Tensor, eps: float, weight: Weight
    ) -> None:
        assert len(norm_I) == weight.cols, norm_I.shape
        self._kept = norm_I, weight  # the C++ keeps addresses
        self._shape = weight.cols, weight.rows
        self._head = _cpu.Head(kernels.native, _address(norm_I), eps, native_weight(weight))

    def logits(self, x_TI: torch.Tensor) -> torch.Tensor:
        """A row for each token."""
        tokens, vocab = self._checked(x_TI), self._shape[1]
        y_TV = torch.empty(tokens, vocab)
        self._head.logits(_address(x_TI), tokens, y_TV.data_ptr())
        return y_TV

    def likeliest(self, x_TI: torch.Tensor) -> list[int]:
        """The logits never leave the C++."""
        return self._head.likeliest(_address(x_TI), self._checked(x_TI))

    def _checked(self, x_TI: torch.Tensor) -> int:
        tokens, hidden = x_TI.shape
        assert hidden == self._shape[0], x_TI.shape
        return tokens


def _native_pages(heads: int, pages: LayerPages) -> _cpu.Pages:
    keys, values = pages.k_PGDS, pages.v_PGSD
    assert keys.dtype == values.dtype == torch.float16 and keys.shape[3] == PAGE_SLOTS
    assert keys.is_contiguous() and values.is_contiguous() and heads % pages.kv_heads == 0
    return _cpu.Pages(heads, pages.kv_heads, pages.head_dim, keys.data_ptr(), values.data_ptr())


def _native_heads(heads: HeadWeights, features: int, dim: int) -> _cpu.Heads:
    bias, norms = heads.bias_X, (heads.q_norm_D, heads.k_norm_D)
    assert bias is None or len(bias) == features, bias.shape
    assert all(norm is None or len(norm) == dim for norm in norms), norms
    q_norm, k_norm = map(_address_if, norms)
    return _cpu.Heads(_address_if(bias), q_norm, k_norm, heads.eps)


def _native_batch(index: BatchIndex) -> _cpu.Batch:
    rope = index.rope
    freqs_NR = rope.freqs_NR
    assert freqs_NR.dtype == torch.float64 and freqs_NR.is_contiguous(), freqs_NR.dtype
    assert len(rope.gains) == rope.rotations, rope.gains
    spans = [part for rows in index.rows for part in (rows.first, rows.stop, rows.position)]
    tables = [_table(rows) for rows in index.rows]
    window_tables = [_table(rows) for rows in index.window_rows or ()]
    adjacent = rope.pairs == "adjacent"
    return _cpu.Batch(
        spans, tables, window_tables, freqs_NR.data_ptr(), rope.gains, rope.turning, adjacent
    )


def _table(rows: Rows) -> int:
    pages, stop = rows.pages, rows.position + rows.stop - rows.first
    assert pages.dtype == torch.int64 and pages.is_contiguous(), (pages.dtype, pages.stride())
    # The C++ reads as many entries as the positions ask for.
    assert rows.position >= 0 and stop <= len(pages) * PAGE_SLOTS, (rows.position, stop, len(pages))
    return pages.data_ptr()


def _address(x: torch.Tensor) -> int:
    assert x.dtype == torch.float32 and x.is_contiguous(), (x.dtype, x.stride())
    return x.data_ptr()


def _address_if(x: torch.Tensor | None) -> int:
    return 0 if x is None else _address(x)


def use_threads(threads: int) -> None:
    """Compute on so many threads of this process, at least one. Not while a kernel runs. Raises
    `ConfigError` if the system does not give so many; the former ones stay."""
    assert threads >= 1, threads
    try:
        _cpu.use_threads(threads)
    except RuntimeError as error:
        raise ConfigError(
            f"--threads {threads}: {error}; take fewer, or raise the limit on processes or memory "
            "(pids.max, ulimit -u, ulimit -v)"
        ) from error


def take_cores() -> None:
    """See `sharding.kernels.take_cores`."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == _cpu.threads() <= _MOST_CORES:
        os.sched_setaffinity(0, cores[:1])
        _cpu.keep_to(cores)
