"""Bytes and FLOPs of a model's parts against numbers computed by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from sharding.cost import (
    ModelCosts,
    activation_bytes,
    buffer_bytes,
    fp32_resident,
    gpu_workspace_bytes,
    model_costs,
)
from sharding.errors import CorruptFileError
from sharding.model.arch import FAMILIES, ModelShape
from sharding.model.rotation import Rotation

TINY = ModelShape(
    family=FAMILIES["llama"],
    name="tiny",
    layers=3,
    hidden=8,
    ffn=12,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=10,
    train_context=64,
    norm_eps=1e-5,
    rotations=(Rotation(10000.0),),
    rope_dims=2,
)
# attn_norm, ffn_norm 8 each; q and output 64 each; k and v 32 each; gate, up, down 96 each
TINY_LAYER_ELEMENTS = 8 + 8 + 64 + 64 + 32 + 32 + 96 * 3

LLAMA_7B = replace(
    TINY, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
)


@dataclass(frozen=True)
class Size:
    """A tensor as the reader describes it, as far as costs care: half a byte a weight."""

    elements: int

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.elements // 2


def table(shape: ModelShape, *, tied: bool) -> dict[str, Size]:
    """The tensor table of a model of this shape."""
    hidden, vocab = shape.hidden, shape.vocab
    parts = {
        "attn_norm": hidden,
        "attn_q": hidden * shape.q_features,
        "attn_k": hidden * shape.kv_features,
        "attn_v": hidden * shape.kv_features,
        "attn_output": hidden * shape.q_features,
        "ffn_norm": hidden,
        "ffn_gate": hidden * shape.ffn,
        "ffn_up": hidden * shape.ffn,
        "ffn_down": hidden * shape.ffn,
    }
    tensors = {"token_embd.weight": Size(hidden * vocab), "output_norm.weight": Size(hidden)}
    for layer in range(shape.layers):
        for part, elements in parts.items():
            tensors[f"blk.{layer}.{part}.weight"] = Size(elements)
    if not tied:
        tensors["output.weight"] = Size(hidden * vocab)
    return tensors


def costs_of(shape: ModelShape, *, tied: bool) -> ModelCosts:
    """Costs under kernels that keep float32."""
    return model_costs(shape, table(shape, tied=tied), fp32_resident)


def test_each_part_is_the_sum_of_its_tensors() -> None:
    """A norm or a projection left out would let a plan overfill a device."""
    costs = costs_of(TINY, tied=False)
    assert costs.layer_bytes == (4 * TINY_LAYER_ELEMENTS,) * 3
    assert costs.embedding_bytes == 4 * 80
    assert costs.output_bytes == 4 * (80 + 8)


def test_layers_keep_their_own_sizes() -> None:
    """Files quantise some layers finer: an average would misplace the cut."""
    tensors = table(TINY, tied=False)
    tensors["blk.1.ffn_down.weight"] = Size(1000)
    first, second, third = model_costs(TINY, tensors, fp32_resident).layer_bytes
    assert (first, third) == (4 * TINY_LAYER_ELEMENTS,) * 2
    assert second == first + 4 * (1000 - 96)


def test_layer_ten_is_not_counted_as_layer_one() -> None:
    """Names are compared by their number, not by their first characters."""
    costs = costs_of(replace(TINY, layers=12), tied=False)
    assert costs.layer_bytes == (4 * TINY_LAYER_ELEMENTS,) * 12


def test_a_layer_s_extra_tensors_count() -> None:
    """Biases and extra norms of other families take memory too."""
    tensors = table(TINY, tied=False) | {"blk.2.attn_q.bias": Size(8)}
    assert model_costs(TINY, tensors, fp32_resident).layer_bytes[2] == 4 * (TINY_LAYER_ELEMENTS + 8)


def test_a_stage_adds_what_only_its_end_of_the_model_holds() -> None:
    """The embedding lies on the first stage, the head on the last, neither in between."""
    costs = costs_of(TINY, tied=False)
    layer = 4 * TINY_LAYER_ELEMENTS
    assert costs.weights_bytes(0, 1) == layer + costs.embedding_bytes
    assert costs.weights_bytes(1, 2) == layer
    assert costs.weights_bytes(2, 3) == layer + costs.output_bytes
    assert costs.weights_bytes(0, 3) == 3 * layer + costs.embedding_bytes + costs.output_bytes


def test_a_tied_head_is_shared_on_one_stage_and_doubled_on_two() -> None:
    """The last stage needs its own copy of a tied embedding; a single stage does not."""
    costs = costs_of(TINY, tied=True)
    layer, matrix, norm = 4 * TINY_LAYER_ELEMENTS, 4 * 80, 4 * 8
    assert costs.weights_bytes(0, 3) == 3 * layer + matrix + norm
    assert costs.weights_bytes(0, 1) + costs.weights_bytes(1, 3) == 3 * layer + 2 * matrix + norm


@pytest.mark.parametrize(
    "name",
    ["blk.2.attn_q.weight", "blk.0.ffn_norm.weight", "token_embd.weight", "output_norm.weight"],
)
def test_a_missing_tensor_is_named(name: str) -> None:
    """A file cut short must say what it lacks, not fail with a KeyError."""
    tensors = table(TINY, tied=True)
    del tensors[name]
    with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")):
        model_costs(TINY, tensors, fp32_resident)


def test_kv_of_a_7b_without_shared_heads_is_512_kib_a_token() -> None:
    """The published figure: 32 layers x 32 heads x 128 x 2 x 2 bytes."""
    costs = ModelCosts(LLAMA_7B, (1,) * 32, 1, 1, 0)
    assert costs.kv_bytes_per_token_per_layer * costs.layers == 512 * 1024


def test_kv_counts_kv_heads_not_query_heads() -> None:
    """Llama-3.1-8B shares each KV head among four query heads: 128 KiB a token."""
    costs = ModelCosts(replace(LLAMA_7B, kv_heads=8), (1,) * 32, 1, 1, 0)
    assert costs.kv_bytes_per_token_per_layer * costs.layers == 128 * 1024


def test_activations_by_hand() -> None:
    """One chunk of 2 tokens: (3 x 8 hidden + 2 x 8 queries + 2 x 4 KV + 4 x 12 ffn) float32 each,
    then the kernels' workspace."""
    expected = 2 * 4 * (24 + 16 + 8 + 48) + 16 * 1024**2
    assert activation_bytes(TINY, 2, last=False) == expected


def test_the_last_stage_pays_for_logits_of_64_rows_at_most() -> None:
    """Logits of a whole 512-token chunk would cost half a GiB with a vocabulary of 262144."""
    wide = replace(TINY, vocab=262144)
    extra = {
        n: activation_bytes(wide, n, last=True) - activation_bytes(wide, n, last=False)
        for n in (1, 64, 512)
    }
    assert extra[1] == 262144 * (2 * 4 + 96)
    assert extra[64] == extra[512] == 262144 * (2 * 64 * 4 + 96)


def test_buffers_hold_a_chunk_in_and_a_chunk_out() -> None:
    """Float32 [512, 4096] twice."""
    assert buffer_bytes(LLAMA_7B, 512) == 2 * 512 * 4096 * 4


def test_a_gpu_s_workspace_by_hand() -> None:
    """A token of Llama-2-7B: FP16 inputs of 11008, float32 products of 22016 outputs, FP16 queries
    and what they saw of a prefix, of 4096 each; beside 640 MiB for any chunk."""
    per_token = 2 * 11008 + 4 * 22016 + 2 * 2 * 4096
    assert gpu_workspace_bytes(LLAMA_7B, 4096) == (640 << 20) + 4096 * per_token
