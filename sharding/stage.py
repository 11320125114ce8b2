"""A stage: a slice of a model's layers, their weights and their KV pages, on one device.

It computes what a batch says and keeps only soft state (page tables, sampling histories, KV). Not
here: Ray, sockets, the choice of what to compute next.

    T tokens of the batch, I hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from sharding.batch import PAGE_SLOTS, Batch, Choice, Opened, Segment, SegmentResult
from sharding.cost import LOGIT_ROWS
from sharding.errors import DoesNotFitError, StageError
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels, Weight, load_kernels
from sharding.kernels.block_weights import BlockWeights
from sharding.model.arch import read_shape
from sharding.model.attention import BatchIndex, build_index
from sharding.model.block import load_block
from sharding.model.kv_cache import PageStore
from sharding.model.rope import rope_of
from sharding.model.sampling import History, keep_allowed, takes_likeliest
from sharding.model.tensors import EMBEDDING, OUTPUT_NORM, check_tensors
from sharding.model.weights import load_factors, load_head, load_vector
from sharding.stage_spec import StageSpec


@dataclass
class _Open:
    """A request on this stage; the last stage also has its sampling history if it needs one.

    `window_table`: of layers with a window, None if they share the others' pages. `pages_exist`:
    whether every page of the tables is one that this stage has.
    """

    opened: Opened
    table: torch.Tensor
    window_table: torch.Tensor | None
    pages_exist: bool
    history: History | None = None


@dataclass
class StageOutput:
    """What one batch made: hidden states `[T, I]` for the next stage, or results from the last.

    The hidden states may be overwritten by the stage's next batch.
    """

    hidden_TI: torch.Tensor | None = None
    segments: list[SegmentResult] = field(default_factory=list)


@contextmanager
def _memory_to_fit(spec: StageSpec) -> Iterator[None]:
    """Says what was being loaded when memory ended; who finds it full is not who filled it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _tells_of_memory(error):
            raise
        said = str(error).split("\n")[0]
        raise DoesNotFitError(
            f"no memory left for layers [{spec.start}, {spec.stop}) with KV of "
            f"{spec.pages * PAGE_SLOTS} tokens: {said}; lower the context, take more stages, or "
            "end what else uses memory",
            max_context=0,
        ) from error


def _tells_of_memory(error: Exception) -> bool:
    """torch has a class for a GPU's memory only: its allocator for CPUs says it in words."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


class Stage:
    """One loaded stage. Not thread-safe: one batch at a time, in the order of the pipeline."""

    def __init__(
        self, spec: StageSpec, file: GGUFFile, report: Callable[[float], None] = lambda share: None
    ) -> None:
        """Load the slice; `report` hears the share loaded, 0 to 1. Raises `ModelFileError`, and
        `DoesNotFitError` where memory that a plan counted on is gone."""
        with _memory_to_fit(spec):
            self._load(spec, file, report)

    def _load(self, spec: StageSpec, file: GGUFFile, report: Callable[[float], None]) -> None:
        self.spec = spec
        self.shape = read_shape(file.metadata, spec.stretch)
        check_tensors(file, self.shape)
        self.kernels: Kernels = load_kernels(spec.kernels)
        self._rope = rope_of(self.shape, load_factors(file, self.shape, spec.context))
        self._embedding = self.kernels.pack(file, [EMBEDDING]) if self.is_first else None
        self._blocks = list(self._load_blocks(file, report))
        self._output: Weight | None = None
        if self.is_last:
            self._output = load_head(file, self.kernels, self._embedding)
            self._output_norm_I = load_vector(file, OUTPUT_NORM).to(self.kernels.device)
            self._head = self.kernels.head(self._output_norm_I, self.shape.norm_eps, self._output)
        self._pages = self._make_pages()
        self._layers = self.kernels.layers(self._blocks, self._pages.layers)
        self._open: dict[int, _Open] = {}
        self._on_host = self.kernels.device.type == "cpu"
        self._embedded_TI = torch.empty(0, self.shape.hidden)
        self.lost = False
        """Whether its device failed: no later batch can be computed in this process."""
        report(1.0)

    def _make_pages(self) -> PageStore:
        spec, shape, mixed = self.spec, self.shape, self.shape.mixes_windows
        layers = range(spec.start, spec.stop)
        counts = [
            spec.window_pages if mixed and shape.window_of(layer) else spec.pages
            for layer in layers
        ]
        return PageStore(counts, shape.kv_heads, shape.head_dim, self.kernels.device)

    def _load_blocks(
        self, file: GGUFFile, report: Callable[[float], None]
    ) -> Iterator[BlockWeights]:
        for layer in range(self.spec.start, self.spec.stop):
            report((layer - self.spec.start) / (self.spec.stop - self.spec.start))
            yield load_block(file, layer, self.shape, self.kernels)

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.spec.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it draws tokens."""
        return self.spec.stop == self.shape.layers

    @property
    def weights_bytes(self) -> int:
        """Resident bytes of the weights; a head shared with the embedding counts once."""
        extra = {id(w): w.n_bytes for w in (self._embedding, self._output) if w is not None}
        norm = self._output_norm_I.nbytes if self.is_last else 0
        return sum(block.n_bytes for block in self._blocks) + sum(extra.values()) + norm

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV pages take when all are used."""
        return self._pages.n_bytes

    @property
    def pages_used(self) -> int:
        """Pages that open requests use, each once."""
        # A copy: whoever asks does so while the stage's own thread opens and closes.
        opened = list(self._open.values())
        return len(set().union(*(entry.opened.pages for entry in opened)))

    def reset(self) -> None:
        """Forget every request: a new epoch of the pipeline begins."""
        self._open.clear()

    def forward(self, batch: Batch, hidden_TI: torch.Tensor | None) -> StageOutput:
        """Apply a batch: closings, openings, then its segments.

        `hidden_TI` comes from the stage before, None on the first, and is used up. Raises
        `StageError` when the batch cannot be computed; openings and closings have taken effect even
        then.
        """
        self.apply_books(batch)
        if not batch.segments:
            return StageOutput()
        try:
            hidden_TI = self.hidden(batch, hidden_TI, self._wanted(batch))
            if not self.is_last:
                return StageOutput(hidden_TI=hidden_TI if self._on_host else hidden_TI.cpu())
            return StageOutput(segments=self._results(batch, hidden_TI))
        except self.kernels.failures as error:
            # This batch is lost, and the stage only if its device is.
            self.lost = not self.kernels.works()
            raise StageError(f"{type(error).__name__}: {error}") from error

    def apply_books(self, batch: Batch) -> None:
        """Close and open the requests that the batch names."""
        for request in batch.closed:
            self._open.pop(request, None)
        for opened in batch.opened:
            self._open[opened.request] = self._opened(opened)

    def _opened(self, opened: Opened) -> _Open:
        exist = all(0 <= page < self.spec.pages for page in opened.pages)
        table = torch.tensor(opened.pages, dtype=torch.int64)
        if not self.shape.mixes_windows:
            return _Open(opened, table, None, exist)
        ring = torch.tensor(opened.window_pages, dtype=torch.int64)
        exist &= all(0 <= page < self.spec.window_pages for page in opened.window_pages)
        turns = -(-len(table) // max(1, len(ring)))
        return _Open(opened, table, ring.repeat(turns)[: len(table)], exist)

    def hidden(
        self, batch: Batch, hidden_TI: torch.Tensor | None, wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Hidden states `[T, I]` after this stage's layers, of rows `wanted` or of all; writes the
        batch's KV."""
        self._check(batch)
        index = self._index(batch)
        if self._embedding is not None:
            hidden_TI = self._embed(batch, self._embedding)
        if hidden_TI is None or hidden_TI.shape != (batch.n_tokens, self.shape.hidden):
            got = None if hidden_TI is None else list(hidden_TI.shape)
            raise StageError(f"hidden states {got} for {batch.n_tokens} x {self.shape.hidden}")
        if not self._on_host:
            hidden_TI, index = hidden_TI.to(self.kernels.device), index.to(self.kernels.device)
        return self._layers.run(hidden_TI, index, wanted)

    def _index(self, batch: Batch) -> BatchIndex:
        opened = {segment.request: self._open[segment.request] for segment in batch.segments}
        tables = {request: entry.table for request, entry in opened.items()}
        if not self.shape.mixes_windows:
            return build_index(batch.segments, tables, self._rope)
        rings = {
            request: entry.window_table
            for request, entry in opened.items()
            if entry.window_table is not None
        }
        return build_index(batch.segments, tables, self._rope, rings)

    def _embed(self, batch: Batch, embedding: Weight) -> torch.Tensor:
        """Into the same tensor as long as batches have as many tokens: the next stage's edge knows
        it then."""
        ids = [token for segment in batch.segments for token in segment.tokens]
        if len(self._embedded_TI) != len(ids):
            self._embedded_TI = torch.empty(len(ids), self.shape.hidden)
        embedded_TI = self.kernels.embed(embedding, ids, self._embedded_TI)
        scale = self.shape.embedding_scale
        return embedded_TI if scale == 1 else embedded_TI.mul_(scale)

    def logits(self, hidden_TI: torch.Tensor) -> torch.Tensor:
        """Logits `[T, V]` of hidden states from the last layer (last stage only)."""
        return self._head.logits(hidden_TI)

    def _check(self, batch: Batch) -> None:
        """The engine is trusted to be sane, its bytes are not: an index out of range would corrupt
        KV."""
        for segment in batch.segments:
            entry = self._open.get(segment.request)
            if entry is None:
                raise StageError(f"request {segment.request} is not open on this stage")
            if not entry.pages_exist:
                windows = self.shape.mixes_windows
                own = f", or a window's outside [0, {self.spec.window_pages})" if windows else ""
                raise StageError(
                    f"request {segment.request}: a page outside [0, {self.spec.pages}){own}"
                )
            room, stop = len(entry.opened.pages) * PAGE_SLOTS, segment.start + len(segment.tokens)
            if stop > room:
                raise StageError(f"request {segment.request}: position {stop} of {room} reserved")
            self._check_window(entry, segment)
            named = (*segment.tokens, *segment.targets)
            if not 0 <= min(named) <= max(named) < self.shape.vocab:
                raise StageError(
                    f"request {segment.request}: a token id outside [0, {self.shape.vocab})"
                )

    def _check_window(self, entry: _Open, segment: Segment) -> None:
        """Its tokens must not be written over what the first of them still sees."""
        if entry.window_table is None:
            return
        room, stop = (
            len(entry.opened.window_pages) * PAGE_SLOTS,
            segment.start + len(segment.tokens),
        )
        if min(stop, len(segment.tokens) + self.shape.window - 1) > room:
            raise StageError(
                f"request {segment.request}: {len(segment.tokens)} tokens and a window of "
                f"{self.shape.window} in {room} slots"
            )

    def _wanted(self, batch: Batch) -> list[int] | None:
        """The rows that results are made from, None for all of them: of a prompt only the last
        one, and a lone user waits for no more."""
        if not self.is_last or any(segment.targets for segment in batch.segments):
            return None
        ends = _drawn_rows(batch)
        return None if len(ends) == batch.n_tokens else ends

    def _results(self, batch: Batch, hidden_TI: torch.Tensor) -> list[SegmentResult]:
        stops = list(accumulate(len(segment.tokens) for segment in batch.segments))
        ends = _drawn_rows(batch)
        drawn_from = hidden_TI if len(ends) == len(hidden_TI) else hidden_TI[ends]
        for segment in batch.segments:
            self._remember(segment)
        if all(self._takes_likeliest(segment) for segment in batch.segments):
            ids = self._likeliest(drawn_from, len(ends))
            if -1 not in ids:  # else the logits tell what is wrong
                drawn = iter(ids)
                return [
                    SegmentResult(at.request, Choice(next(drawn)) if at.sample else None)
                    for at in batch.segments
                ]
        return list(self._drawn_one_by_one(batch, hidden_TI, stops, self._rows(drawn_from)))

    def _takes_likeliest(self, segment: Segment) -> bool:
        """Whether its logits need not be seen."""
        if segment.targets or not segment.sample:
            return not segment.targets
        opened = self._open[segment.request].opened
        drawn = segment.start + len(segment.tokens) - opened.prompt_tokens
        return not segment.allowed and takes_likeliest(opened.sampling, drawn)

    def _likeliest(self, hidden_TI: torch.Tensor, rows: int) -> list[int]:
        if rows <= LOGIT_ROWS:  # no slice for decoded tokens
            return self._head.likeliest(hidden_TI) if rows else []
        slabs = hidden_TI.split(LOGIT_ROWS)
        return [token for slab in slabs for token in self._head.likeliest(slab)]

    def _drawn_one_by_one(
        self,
        batch: Batch,
        hidden_TI: torch.Tensor,
        stops: Sequence[int],
        logits: Iterator[torch.Tensor],
    ) -> Iterator[SegmentResult]:
        for segment, stop in zip(batch.segments, stops, strict=True):
            logits_V = next(logits) if segment.sample else None
            try:
                scores = list(self._scores(segment, hidden_TI, stop - len(segment.tokens)))
                drawn = None if logits_V is None else self._draw(segment, logits_V)
            except StageError as error:
                yield SegmentResult(segment.request, error=str(error))
            else:
                yield SegmentResult(segment.request, drawn, scores)

    def _rows(self, hidden_TI: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits, row by row."""
        for slab in hidden_TI.split(LOGIT_ROWS):
            yield from self.logits(slab)

    def _remember(self, segment: Segment) -> None:
        entry = self._open[segment.request]
        if not entry.opened.sampling.needs_history:
            return
        if entry.history is None:  # made here, where a full device costs a batch and not its books
            entry.history = History(self.shape.vocab, self.kernels.device)
            entry.history.add_seen(entry.opened.seen)
            entry.history.add_output(entry.opened.drawn)
        border = max(0, entry.opened.prompt_tokens - segment.start)
        entry.history.add_prompt(segment.tokens[:border])
        entry.history.add_output(segment.tokens[border:])

    def _draw(self, segment: Segment, logits_V: torch.Tensor) -> Choice:
        entry, position = self._open[segment.request], segment.start + len(segment.tokens)
        drawn = position - entry.opened.prompt_tokens
        params = entry.opened.sampling
        left_V = keep_allowed(logits_V, segment.allowed) if segment.allowed else logits_V
        token = self.kernels.draw(left_V, params, position, drawn, entry.history)
        if params.logprobs is None:
            return Choice(token)
        return self.kernels.score(logits_V[None], [token], params.logprobs)[0]

    def _scores(
        self, segment: Segment, hidden_TI: torch.Tensor, first_row: int
    ) -> Iterator[Choice]:
        for first in range(0, len(segment.targets), LOGIT_ROWS):
            targets = segment.targets[first : first + LOGIT_ROWS]
            row = first_row + first
            logits_TV = self.logits(hidden_TI[row : row + len(targets)])
            yield from self.kernels.score(logits_TV, targets, segment.alternatives)


def _drawn_rows(batch: Batch) -> list[int]:
    """The last row of each segment after which a token is drawn."""
    stops = accumulate(len(segment.tokens) for segment in batch.segments)
    return [stop - 1 for stop, at in zip(stops, batch.segments, strict=True) if at.sample]
