"""Model families as rows of data, and a model's shape read from GGUF metadata.

Not here: tensors and arithmetic. A family is one `Family` row; a difference that needs its own
arithmetic becomes a function beside the others of its kind, not one more flag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sharding.errors import CorruptFileError, UnsupportedModelError
from sharding.model.keys import KeyReader, Metadata
from sharding.model.rotation import Rotation, Stretch, read_rotations

Pairs = Literal["adjacent", "halves"]
Activation = Literal["silu", "gelu"]
Mixtures = Literal["never", "some", "always"]


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture from another.

    `rope_pairs`: which elements of a head rotate together, "adjacent" (2i, 2i+1) or "halves" (i, i
    + D/2). `activation`: of the gate. `head_norms`: queries and keys are normed head by head before
    they turn. `post_norms`: what attention and feed-forward add is normed first.
    `scaled_embedding`: by the root of the hidden size. `windows`: layers may see but a window;
    `global_every`: the last of so many sees all nevertheless, 0 if none does. `fused`: matrices
    with the same input are one tensor in the file, too. `mixtures`: whether a feed-forward is a
    mixture of experts; of "some", the file tells.
    """

    name: str
    rope_pairs: Pairs
    activation: Activation = "silu"
    head_norms: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    windows: bool = False
    global_every: int = 0
    fused: bool = False
    mixtures: Mixtures = "never"


_FAMILIES = (
    Family("llama", "adjacent", windows=True, mixtures="some"),
    Family("qwen2", "halves"),
    Family("qwen3", "halves", head_norms=True),
    Family("qwen3moe", "halves", head_norms=True, mixtures="always"),
    Family("phi3", "halves", windows=True, fused=True),
    Family("gemma", "halves", "gelu", scaled_embedding=True),
    Family(
        "gemma3", "halves", "gelu",
        head_norms=True, post_norms=True, scaled_embedding=True, windows=True, global_every=6,
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _FAMILIES}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. `rope_dims` of each head rotate; `train_context` is advisory.

    `window`: a token sees so many tokens, its own the last of them, or all if that is 0;
    `global_every`: the last of so many layers sees all nevertheless, 0 if none does. `rotations`:
    of layers that see all, then, if they differ, of those with a window. `score_scale`: attention's
    scores are times that and 1 / sqrt(head_dim). `ffn`: of each of the `experts`, if there are any,
    of which a token takes `experts_used`.
    """

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
    rotations: tuple[Rotation, ...]
    rope_dims: int
    window: int = 0
    global_every: int = 0
    score_scale: float = 1.0
    experts: int = 0
    experts_used: int = 0

    @property
    def q_features(self) -> int:
        """Columns of the query projection's output."""
        return self.heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Columns of the key (or value) projection's output."""
        return self.kv_heads * self.head_dim

    @property
    def embedding_scale(self) -> float:
        """Embedded tokens are times this."""
        return math.sqrt(self.hidden) if self.family.scaled_embedding else 1.0

    def window_of(self, layer: int) -> int:
        """That layer's window, 0 for none."""
        every = self.global_every
        return 0 if every and (layer + 1) % every == 0 else self.window

    @property
    def mixes_windows(self) -> bool:
        """Whether some layers have a window and others see all: those with a window then keep but
        the keys and values that can still be seen."""
        return self.window > 0 and 0 < self.global_every <= self.layers > 1

    def windows_within(self, start: int, stop: int) -> int:
        """How many of the layers `[start, stop)` keep but a window."""
        if not self.mixes_windows:
            return 0
        every = self.global_every
        return stop - start - (stop // every - start // every)

    def rotation_of(self, layer: int) -> int:
        """The number of that layer's rotation."""
        return len(self.rotations) - 1 if self.window_of(layer) else 0


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.beta_fast": (32,),
    "rope.scaling.beta_slow": (1,),
    "rope.scaling.extrapolation_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
"""Keys of arithmetic that is not done here, and the values that ask for none of it."""

_NEUTRAL_OF_MIXTURES: dict[str, tuple[object, ...]] = {
    "expert_gating_func": (1, 0),  # softmax, or not said
    "expert_group_count": (0, 1),
    "expert_group_scale": (1,),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (1, 0),
    "interleave_moe_layer_step": (1, 0),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (1, 0),
    "router_logit_softcapping": (0,),
}
"""The same where there are experts."""

_RELATIVE = 1e-6  # between two ways to write a float32


def read_shape(metadata: Metadata, stretch: Stretch | None = None) -> ModelShape:
    """Read a model's shape from GGUF metadata, with a user's rotary scaling if there is one.

    Raises `UnsupportedModelError` for an architecture, scaling or mixture of experts that is not
    computed here, and `CorruptFileError` for missing or impossible sizes. Keys: the GGUF
    specification's `[llm]` section.
    """
    family = _family(metadata)
    if stretch is not None:
        metadata = stretch.onto(metadata, family.name)
    read = KeyReader(metadata, family.name)
    experts, used, ffn = _experts(read, family)
    hidden, heads = read.whole("embedding_length"), read.whole("attention.head_count")
    kv_heads = read.whole("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CorruptFileError(f"{heads} query heads cannot share {kv_heads} KV heads")
    head_dim = read.whole("attention.key_length", hidden // heads)
    if read.whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("keys and values of different head sizes are not supported")
    _check_neutral(metadata, family, head_dim, mixes=experts > 0)
    rope_dims = read.whole("rope.dimension_count", head_dim)
    if rope_dims > head_dim or rope_dims % 2:
        raise CorruptFileError(f"{rope_dims} rotary dimensions do not fit a head of {head_dim}")
    layers = read.whole("block_count")
    window, every = _windows(read, family)
    return ModelShape(
        family=family,
        name=str(metadata.get("general.name") or family.name),
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=_vocab(metadata, read),
        train_context=read.whole("context_length"),
        norm_eps=read.real("attention.layer_norm_rms_epsilon"),
        rotations=read_rotations(read, two=family.global_every > 0),
        rope_dims=rope_dims,
        window=window,
        global_every=every,
        score_scale=_score_scale(family, layers, hidden / heads, head_dim),
        experts=experts,
        experts_used=used,
    )


def _experts(read: KeyReader, family: Family) -> tuple[int, int, int]:
    """Experts, how many of them a token takes, and the width of each; 0, 0 and the feed-forward's
    for a model without."""
    always = family.mixtures == "always"
    count = read.whole("expert_count", None if always else 0, least=1 if always else 0)
    if count == 0:
        return 0, 0, read.whole("feed_forward_length")
    if family.mixtures == "never":
        raise UnsupportedModelError(f"{family.name} with a mixture of experts is not supported")
    used = read.whole("expert_used_count")
    if used > count:
        raise CorruptFileError(
            f"{read.prefix}.expert_used_count is {used}, but there are {count} experts"
        )
    own = read.whole("expert_feed_forward_length", 0, least=0)
    return count, used, own or read.whole("feed_forward_length")


def _check_neutral(metadata: Metadata, family: Family, head_dim: int, mixes: bool) -> None:
    """Raises `UnsupportedModelError` for a key that would change what is computed."""
    keys = _NEUTRAL | {"attention.scale": (0, head_dim**-0.5)}
    for key, neutral in (keys | (_NEUTRAL_OF_MIXTURES if mixes else {})).items():
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


def _vocab(metadata: Metadata, read: KeyReader) -> int:
    """As many as the tokenizer has: ids beyond that cannot be turned into text, so none may
    exist."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) and tokens else read.whole("vocab_size")


def _score_scale(family: Family, layers: int, share: float, head_dim: int) -> float:
    """Gemma 3 27B alone scales scores by a head's `share` of the hidden size. Nothing in the file
    tells it from its sisters but the number of layers, which llama.cpp goes by too."""
    if family.name == "gemma3" and layers == 62:
        return math.sqrt(head_dim / share)
    return 1.0


def _windows(read: KeyReader, family: Family) -> tuple[int, int]:
    """The window, 0 for none, and of how many layers the last sees all. Raises
    `UnsupportedModelError` for a window in a family whose layers all see everything."""
    window = read.whole("attention.sliding_window", 0, least=0)
    pattern = f"{read.prefix}.attention.sliding_window_pattern"
    if family.global_every:
        return window, read.whole("attention.sliding_window_pattern", family.global_every)
    if 0 < window < read.whole("context_length") and not family.windows:
        raise UnsupportedModelError(
            f"{read.prefix}.attention.sliding_window of {window} is not supported in this family"
        )
    if window and pattern in read.metadata:
        raise UnsupportedModelError(f"{pattern} is not supported in this family")
    return (window if family.windows else 0), 0
