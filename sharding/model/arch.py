"""Model families as rows of data, and a model's shape read from GGUF metadata.

Not here: tensors and arithmetic. A family is one `Family` row; a difference that needs its own
arithmetic becomes a function beside the others of its kind, not one more flag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharding.errors import CorruptFileError, UnsupportedModelError

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture from another.

    `rope_pairs`: which elements of a head rotate together, "adjacent" (2i, 2i+1) or "halves" (i, i
    + D/2).
    """

    name: str
    rope_pairs: str


FAMILIES = {family.name: family for family in (Family("llama", rope_pairs="adjacent"),)}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. `rope_dims` of each head rotate; `train_context` is advisory; a token
    sees `window` tokens, its own the last of them, or all if that is 0."""

    family: Family
    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    train_context: int
    norm_eps: float
    rope_base: float
    rope_scale: float
    rope_dims: int
    window: int = 0

    @property
    def q_features(self) -> int:
        """Columns of the query projection's output."""
        return self.heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Columns of the key (or value) projection's output."""
        return self.kv_heads * self.head_dim


# Bounds that no published model comes near; beyond them a file is hostile or broken.
_MOST = {"block_count": 4096, "head_count": 4096, "embedding_length": 1 << 20}


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "use_parallel_residual": (False,),
}
"""Keys of arithmetic that is not done here, and the values that ask for none of it."""

_RELATIVE = 1e-6  # between two ways to write a float32


class _Reader:
    """Reads `<family>.<key>` with a type and a range, naming the key in every complaint."""

    def __init__(self, metadata: Metadata, prefix: str) -> None:
        self.metadata = metadata
        self.prefix = prefix

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise CorruptFileError(f"metadata key {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise UnsupportedModelError(
                f"{name} is {value!r:.60}; one whole number for all layers is expected"
            )
        most = _MOST.get(key.rpartition(".")[2], 1 << 31)
        if not least <= value <= most:
            raise CorruptFileError(f"{name} is {value}, outside [{least}, {most}]")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise CorruptFileError(f"metadata key {name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CorruptFileError(f"{name} is {value!r:.60}, not a number")
        if not math.isfinite(value) or value <= 0:
            raise CorruptFileError(f"{name} is {value}; a finite number above 0 is expected")
        return float(value)


def read_shape(metadata: Metadata) -> ModelShape:
    """Read a model's shape from GGUF metadata.

    Raises `UnsupportedModelError` for an architecture, scaling or expert mixture that is not
    computed here, and `CorruptFileError` for missing or impossible sizes. Keys: the GGUF
    specification's `[llm]` section.
    """
    family = _family(metadata)
    read = _Reader(metadata, family.name)
    if read.whole("expert_count", 0, least=0) > 0:
        raise UnsupportedModelError(f"{family.name} with a mixture of experts is not supported")
    hidden, heads = read.whole("embedding_length"), read.whole("attention.head_count")
    kv_heads = read.whole("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CorruptFileError(f"{heads} query heads cannot share {kv_heads} KV heads")
    head_dim = read.whole("attention.key_length", hidden // heads)
    if read.whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("keys and values of different head sizes are not supported")
    _check_neutral(metadata, family, head_dim)
    rope_dims = read.whole("rope.dimension_count", head_dim)
    if rope_dims > head_dim or rope_dims % 2:
        raise CorruptFileError(f"{rope_dims} rotary dimensions do not fit a head of {head_dim}")
    return ModelShape(
        family=family,
        name=str(metadata.get("general.name") or family.name),
        layers=read.whole("block_count"),
        hidden=hidden,
        ffn=read.whole("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=_vocab(metadata, read),
        train_context=read.whole("context_length"),
        norm_eps=read.real("attention.layer_norm_rms_epsilon"),
        rope_base=read.real("rope.freq_base", 10000.0),
        rope_scale=_rope_scale(metadata, read),
        rope_dims=rope_dims,
        window=read.whole("attention.sliding_window", 0, least=0),
    )


def _check_neutral(metadata: Metadata, family: Family, head_dim: int) -> None:
    """Raises `UnsupportedModelError` for a key that would change what is computed."""
    usual = {"attention.scale": (0, head_dim**-0.5)}
    for key, neutral in (_NEUTRAL | usual).items():
        name = f"{family.name}.{key}"
        value = metadata.get(name, neutral[0])
        if not any(_equal(value, one) for one in neutral):
            raise UnsupportedModelError(f"{name} of {value!r:.60} is not supported")


def _equal(value: object, other: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(value, other, rel_tol=_RELATIVE)
    return value == other


def _family(metadata: Metadata) -> Family:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CorruptFileError("metadata key general.architecture is missing or no string")
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"architecture {name!r:.60} is not supported; supported: {known}"
        )
    return FAMILIES[name]


def _vocab(metadata: Metadata, read: _Reader) -> int:
    """As many as the tokenizer has: ids beyond that cannot be turned into text, so none may
    exist."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) and tokens else read.whole("vocab_size")


def _rope_scale(metadata: Metadata, read: _Reader) -> float:
    """Positions are divided by this; 1 where the file asks for no scaling.

    A factor without a type is a linear one, and older files call it `rope.scale_linear`. One of 0
    stands for none.
    """
    kind = metadata.get(f"{read.prefix}.rope.scaling.type", "linear")
    if kind == "none":
        return 1.0
    if kind == "linear":
        keys = ("rope.scaling.factor", "rope.scale_linear")
        given = [key for key in keys if metadata.get(f"{read.prefix}.{key}", 0) != 0]
        return read.real(given[0]) if given else 1.0
    raise UnsupportedModelError(
        f"rotary scaling of type {kind!r:.60} is not supported; supported: none, linear"
    )
