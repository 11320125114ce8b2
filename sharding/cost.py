"""Bytes of a model's parts, as pure functions of its shape and its tensor table.

Not here: how layers are divided over devices (`planner`), and any tensor. Everything is exact
integer arithmetic in bytes; activations are an upper bound, explained term by term.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, TypeVar

from sharding.errors import CorruptFileError
from sharding.model.arch import ModelShape
from sharding.model.tensors import matrices

if TYPE_CHECKING:
    from sharding.gguf.reader import TensorInfo

FP32_BYTES = 4
FP16_BYTES = 2

WORKSPACE_BYTES = 16 << 20
"""Bound on what attention holds beside its input and output: tiles of scores, keys and values. The
reference needs 8 tokens x 256 slots x 4 bytes a head, a few times, at any depth."""

_GPU_FIXED_BYTES = 640 << 20
"""128 MiB of expanded weights, 256 MiB of a long prefix's keys and values, and as much for what
CUDA graphs keep and for gaps."""

LOGIT_ROWS = 64
"""Most rows of logits `[rows, vocab]` that the last stage computes at a time."""

SAMPLER_BYTES_PER_TOKEN = 96
"""Per vocabulary entry of the one row being drawn: twelve float64 or int64 vectors (adjusted and
scaled logits, ids, weights, running sum, hash words and their temporaries, noise)."""

_EMBEDDING, _FINAL_NORM, _HEAD = "token_embd.weight", "output_norm.weight", "output.weight"


PANEL_ROWS, CHUNK_COLUMNS = 16, 32
"""The CPU kernels pad a matrix to whole panels of rows, and to whole chunks of columns."""

_UNPACKED_SCALE_BYTES = {"Q3_K": 4, "Q4_K": 4, "Q5_K": 4, "IQ4_XS": 2}
"""What a unit grows by because its 6-bit scales take a byte each (kernels/csrc/layout.h)."""


class TensorSize(Protocol):
    """The part of `gguf.reader.TensorInfo` that costs depend on."""

    @property
    def elements(self) -> int:
        """Number of weights."""

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""


def fp32_resident(info: TensorSize) -> int:
    """Bytes in memory under kernels that expand every weight to float32 (the reference)."""
    return FP32_BYTES * info.elements


def packed_resident(info: TensorInfo) -> int:
    """Bytes in memory under the CPU kernels: quantised as in the file, float32 if a vector."""
    if len(info.shape) == 1:
        return FP32_BYTES * info.elements
    format, rows, experts = info.format, info.shape[1], math.prod(info.shape[2:])
    columns = max(CHUNK_COLUMNS, format.block_elements)
    unit_bytes = columns // format.block_elements * format.block_bytes
    unit_bytes += _UNPACKED_SCALE_BYTES.get(format.name, 0)
    whole_rows = experts * -(-rows // PANEL_ROWS) * PANEL_ROWS
    return whole_rows * -(-info.cols // columns) * unit_bytes


def gpu_workspace_bytes(shape: ModelShape, chunk_tokens: int) -> int:
    """What `WORKSPACE_BYTES` is for the CPU's kernels, of the Triton kernels.

    Beside what is there for any chunk, per token: a product's input in FP16 and its output before
    it is scaled; queries in FP16 and what they saw of a prefix.
    """
    widest_in = max(shape.hidden, shape.ffn, shape.q_features)
    widest_out = max(shape.q_features + 2 * shape.kv_features, 2 * shape.ffn)
    product = FP16_BYTES * widest_in + FP32_BYTES * widest_out
    return _GPU_FIXED_BYTES + chunk_tokens * (product + 2 * FP16_BYTES * shape.q_features)


Size = TypeVar("Size", bound=TensorSize)


@dataclass(frozen=True)
class ModelCosts:
    """Resident bytes of a model's parts.

    `layer_bytes[i]`: weights of layer i. `embedding_bytes`: token embedding, on the first stage.
    `output_bytes`: final norm and head, on the last stage. `tied_bytes`: the head's bytes if the
    head is the embedding, else 0; they are shared where first and last stage are one.
    `workspace_bytes`: what the kernels hold beside inputs and outputs.
    """

    shape: ModelShape
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    tied_bytes: int
    workspace_bytes: int = WORKSPACE_BYTES

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.layer_bytes)

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        """A key and a value of every KV head, in FP16."""
        return 2 * self.shape.kv_features * FP16_BYTES

    @cached_property
    def _layer_bytes_before(self) -> tuple[int, ...]:
        return tuple(accumulate(self.layer_bytes, initial=0))

    def weights_bytes(self, start: int, stop: int) -> int:
        """Weights of a stage of layers `[start, stop)`, with what the first and the last add."""
        total = self._layer_bytes_before[stop] - self._layer_bytes_before[start]
        if start == 0:
            total += self.embedding_bytes
        if stop == self.layers:
            total += self.output_bytes
        if start == 0 and stop == self.layers:
            total -= self.tied_bytes
        return total

    def work(self, start: int, stop: int) -> int:
        """How long layers `[start, stop)` take, in no unit. All layers take as long as another; the
        embedding takes nothing, and the head counts half: a decoded token needs it, a chunk of a
        prompt does not."""
        layers = 2 * (stop - start) * (sum(self.layer_bytes) // self.layers)
        return layers + (self.output_bytes if stop == self.layers else 0)


def model_costs(
    shape: ModelShape,
    tensors: Mapping[str, Size],
    weight_bytes: Callable[[Size], int],
    workspace_bytes: int = WORKSPACE_BYTES,
) -> ModelCosts:
    """Add up a file's tensor table. `weight_bytes` says what the kernels keep of one tensor.

    Every tensor of a layer counts, also those that only some families have (biases, extra norms).
    Raises `CorruptFileError` naming a tensor that is missing.
    """
    sums: defaultdict[str, int] = defaultdict(int)
    for name, info in tensors.items():
        if name.startswith("blk."):
            sums[name.split(".")[1]] += weight_bytes(info)
    for name in _required(shape):
        if name not in tensors:
            raise CorruptFileError(
                f"tensor {name} is missing; a {shape.family.name} model of {shape.layers} layers "
                "needs it"
            )
    embedding = weight_bytes(tensors[_EMBEDDING])
    tied = _HEAD not in tensors
    head = embedding if tied else weight_bytes(tensors[_HEAD])
    return ModelCosts(
        shape=shape,
        layer_bytes=tuple(sums[str(layer)] for layer in range(shape.layers)),
        embedding_bytes=embedding,
        output_bytes=head + weight_bytes(tensors[_FINAL_NORM]),
        tied_bytes=head if tied else 0,
        workspace_bytes=workspace_bytes,
    )


def _required(shape: ModelShape) -> list[str]:
    parts = ("attn_norm.weight", "ffn_norm.weight", *matrices(shape))
    blocks = [f"blk.{layer}.{part}" for layer in range(shape.layers) for part in parts]
    return [_EMBEDDING, *blocks, _FINAL_NORM]


def _feed_forward_width(shape: ModelShape) -> int:
    """Products of a token with a layer's feed-forward, for each element of its hidden state: of
    experts only those that it takes count."""
    return 3 * shape.ffn * max(1, shape.experts_used) + shape.experts


def even_depth(shape: ModelShape) -> int:
    """How deep a token has as many products with keys and values as with all layers' matrices:
    there it takes about twice as long as at the beginning. What layers with a window see does not
    grow, so they do not count."""
    attention = 2 * shape.q_features + 2 * shape.kv_features
    growing = shape.layers - shape.windows_within(0, shape.layers)
    products = shape.layers * shape.hidden * (attention + _feed_forward_width(shape))
    return products // (growing * 2 * shape.q_features)


def activation_bytes(
    shape: ModelShape,
    chunk_tokens: int,
    *,
    last: bool,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> int:
    """Upper bound on a stage's tensors beside weights and KV while it computes one chunk.

    Everything is float32, one layer at a time. Per token: three hidden states (the residual stream,
    its normalised copy, the output to be added); queries, keys, values and attention's output,
    which is as wide as the queries; gate and up, the activated gate and the product. Attention and
    feed-forward never live at once; adding both pays for the rotations' temporaries. In a mixture a
    token counts once for each expert that it takes, with its hidden state, which is copied,
    prepared and multiplied there, and it has logits of all experts. Per stage: the kernels'
    workspace. The `last` stage adds up to `LOGIT_ROWS` rows of logits, as many of
    log-probabilities, and the sampler's copies of one row.
    """
    attention = 2 * shape.q_features + 2 * shape.kv_features
    numbers = 3 * shape.hidden + attention + 4 * shape.ffn
    if shape.experts:
        taken = shape.experts_used * (3 * shape.hidden + 4 * shape.ffn)
        numbers = 3 * shape.hidden + attention + taken + shape.experts
    total = chunk_tokens * FP32_BYTES * numbers + workspace_bytes
    if last:
        rows = min(LOGIT_ROWS, chunk_tokens)
        total += shape.vocab * (2 * rows * FP32_BYTES + SAMPLER_BYTES_PER_TOKEN)
    return total


def buffer_bytes(shape: ModelShape, chunk_tokens: int) -> int:
    """The transport's receive and send buffers, each float32 `[chunk_tokens, hidden]`."""
    return 2 * chunk_tokens * shape.hidden * FP32_BYTES
