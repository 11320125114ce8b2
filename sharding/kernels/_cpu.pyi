"""The compiled module; addresses are of arrays that the caller keeps alive."""

import enum
from collections.abc import Sequence

class Weight:
    """Packed as these kernels want it."""

    def __init__(self, cols: int, kernels: Kernels) -> None: ...
    def append(self, type: int, rows: list[int], files: list[int], row_bytes: int) -> None:
        """Tensors of one type; all but the last have whole panels of rows."""
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...

class Pages:
    def __init__(self, heads: int, kv_heads: int, dim: int, keys: int, values: int) -> None: ...

class Heads:
    """A bias of all heads, norms of queries and keys; 0 for none."""

    def __init__(self, bias: int, q_norm: int, k_norm: int, eps: float) -> None: ...

class Activation(enum.Enum):
    silu = 0
    gelu = 1

class Batch:
    """`spans`: first row, stop row and position of each segment, one after the other; `tables`: the
    addresses of their page tables, and those of layers with a window if they have their own;
    `frequencies`: that of float64 `[rotations, pairs]`, as many rotations as `gains`."""

    def __init__(
        self,
        spans: list[int],
        tables: list[int],
        window_tables: list[int],
        frequencies: int,
        gains: Sequence[float],
        pairs: int,
        adjacent: bool,
    ) -> None: ...

class FeedForward:
    def __init__(
        self, router: Weight | None, gate_up: list[Weight], down: list[Weight], used: int
    ) -> None:
        """One pair of matrices, or, with a router, one for each expert."""

class Layers:
    def __init__(self, kernels: Kernels) -> None: ...
    def append(
        self,
        norms: list[int],
        eps: float,
        qkv: Weight,
        output: Weight,
        feed: FeedForward,
        pages: Pages,
        window: int,
        heads: Heads,
        rotation: int,
        activation: Activation,
    ) -> None:
        """`norms`: before attention, before the feed-forward, after each; the latter 0 for none."""
    def run(self, x: int, batch: Batch, y: int) -> None: ...
    def run_wanted(self, x: int, batch: Batch, wanted: list[int], y: int) -> None:
        """`wanted` ascends; those rows become the first of y."""

class Head:
    def __init__(self, kernels: Kernels, norm: int, eps: float, weight: Weight) -> None: ...
    def logits(self, x: int, tokens: int, y: int) -> None: ...
    def likeliest(self, x: int, tokens: int) -> list[int]:
        """-1 for a row with a logit that is not finite."""

class Kernels:
    def __init__(self, isa: str) -> None: ...
    def matmul(self, x: int, tokens: int, weight: Weight, residual: int, y: int) -> None: ...
    def embed(self, weight: Weight, ids: Sequence[int], y: int) -> None: ...
    def rms_norm(
        self, x: int, tokens: int, width: int, scale: int, eps: float, residual: int, y: int
    ) -> None: ...
    def gated(self, x: int, tokens: int, width: int, activation: Activation, y: int) -> None: ...
    def mix_experts(
        self,
        x: int,
        tokens: int,
        feed: FeedForward,
        activation: Activation,
        residual: int,
        y: int,
    ) -> None: ...
    def rotate_and_store(
        self, qkv: int, heads: Heads, rotation: int, batch: Batch, pages: Pages, q: int
    ) -> None: ...
    def attention(self, q: int, batch: Batch, pages: Pages, window: int, y: int) -> None: ...
    def draw(
        self,
        logits: int,
        n: int,
        filters: Sequence[float],
        penalties: Sequence[float],
        seen: int,
        counts: int,
        biased: Sequence[int],
        bias: Sequence[float],
        banned: Sequence[int],
        seed: int,
        position: int,
    ) -> int:
        """`filters`: temperature, top_k, top_p, min_p; `penalties`: repetition, presence,
        frequency. -1 where nothing can be drawn."""
    def score(self, logits: int, n: int, token: int, alternatives: int) -> list[tuple[int, float]]:
        """The token, then the likeliest; empty for logits that are broken."""

def instruction_sets() -> list[str]: ...
def use_threads(threads: int) -> None: ...
def threads() -> int: ...
def pairs_columns() -> bool:
    """Whether products of many tokens take columns in pairs; no bit of a result depends on it."""

def pair_columns(yes: bool) -> None: ...
def keep_to(cores: list[int]) -> None:
    """Worker t to `cores[t]`; the first is the caller's."""
