"""A model's tensors by their GGUF names: which there are, and of what shape.

Not here: loading them (`weights.py`). No torch, so that a plan can check a file at once.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from sharding.errors import CorruptFileError, UnsupportedModelError
from sharding.gguf.reader import GGUFFile
from sharding.model.arch import Family, ModelShape

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ATTENTION_POST_NORM, FFN_POST_NORM = "post_attention_norm", "post_ffw_norm"


def qkv_tensors(family: Family) -> tuple[str, ...]:
    """The tensors within a layer that make queries, keys and values, in this order."""
    return ("attn_qkv.weight",) if family.fused else tuple(f"attn_{part}.weight" for part in "qkv")


def gate_up_tensors(family: Family) -> tuple[str, ...]:
    """The tensors within a layer that make gates and what they let through, in this order."""
    return ("ffn_up.weight",) if family.fused else ("ffn_gate.weight", "ffn_up.weight")


ROUTER, DOWN_EXPERTS = "ffn_gate_inp.weight", "ffn_down_exps.weight"
GATE_UP_EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight")


def _feed_forward(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, ffn, experts = shape.hidden, shape.ffn, shape.experts
    if experts:
        wide = dict.fromkeys(GATE_UP_EXPERTS, (hidden, ffn, experts))
        return {ROUTER: (hidden, experts), DOWN_EXPERTS: (ffn, hidden, experts), **wide}
    wide_rows = 2 * ffn if shape.family.fused else ffn
    names = gate_up_tensors(shape.family)
    return {"ffn_down.weight": (ffn, hidden), **dict.fromkeys(names, (hidden, wide_rows))}


def matrices(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """All of a layer, by their names after `blk.N.`, with their shapes in GGUF order: columns
    first."""
    hidden, queries, keys = shape.hidden, shape.q_features, shape.kv_features
    rows = (queries + 2 * keys,) if shape.family.fused else (queries, keys, keys)
    names = qkv_tensors(shape.family)
    return {
        **{name: (hidden, count) for name, count in zip(names, rows, strict=True)},
        "attn_output.weight": (queries, hidden),
        **_feed_forward(shape),
    }


def _biases(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Those of queries, keys and values, which a layer has all or none of."""
    keys = (shape.kv_features,)
    return {"attn_q.bias": (shape.q_features,), "attn_k.bias": keys, "attn_v.bias": keys}


def has_bias(file: GGUFFile, layer: int) -> bool:
    """Whether that layer's queries, keys and values have one."""
    return f"blk.{layer}.attn_q.bias" in file.tensors


def _layer_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names within a layer (after `blk.N.`) and shapes in GGUF order: columns first."""
    hidden, family = shape.hidden, shape.family
    tensors: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        **matrices(shape),
    }
    if family.head_norms:
        tensors["attn_q_norm.weight"] = tensors["attn_k_norm.weight"] = (shape.head_dim,)
    if family.post_norms:
        tensors[f"{ATTENTION_POST_NORM}.weight"] = (hidden,)
        tensors[f"{FFN_POST_NORM}.weight"] = (hidden,)
    return tensors


def _expected(
    shape: ModelShape, present: Container[str]
) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, required) of every tensor that the model may have beside those present."""
    yield EMBEDDING, (shape.hidden, shape.vocab), True
    yield OUTPUT_NORM, (shape.hidden,), True
    yield OUTPUT, (shape.hidden, shape.vocab), False
    yield ROPE_FACTORS, (shape.rope_dims // 2,), False
    two = (LONG_FACTORS, SHORT_FACTORS)
    longrope = shape.rotations[0].longrope or any(name in present for name in two)
    for name in two:
        yield name, (shape.rope_dims // 2,), longrope
    inside, biases = _layer_tensors(shape), _biases(shape)
    for layer in range(shape.layers):
        for name, dims in inside.items():
            yield f"blk.{layer}.{name}", dims, True
        biased = any(f"blk.{layer}.{name}" in present for name in biases)
        for name, dims in biases.items():
            yield f"blk.{layer}.{name}", dims, biased


def check_tensors(file: GGUFFile, shape: ModelShape) -> None:
    """Prove that a file holds just the tensors that this model computes, in the right shapes and
    formats.

    Raises `CorruptFileError` for a missing tensor or a wrong shape, and `UnsupportedModelError` for
    a format that is not computed or a tensor that would go unused: an answer without it would be
    wrong.
    """
    split = "blk.0.ffn_gate.0.weight"
    if shape.experts and split in file.tensors:
        raise UnsupportedModelError(
            f"{file.paths[0]}: each expert has tensors of its own ({split}), as older files have "
            "them; convert the original model again"
        )
    known = set()
    for name, dims, required in _expected(shape, file.tensors):
        known.add(name)
        info = file.tensors.get(name)
        if info is None:
            if required:
                raise CorruptFileError(f"{file.paths[0]}: tensor {name} is missing")
            continue
        if info.shape != dims:
            raise CorruptFileError(
                f"{file.paths[0]}: tensor {name} is {list(info.shape)}, "
                f"the metadata ask for {list(dims)}"
            )
        if not info.format.computed:
            raise UnsupportedModelError(
                f"{file.paths[0]}: tensor {name} has quantisation {info.format.name}, "
                "which is not supported"
            )
    for name in file.tensors:
        if name not in known:
            raise UnsupportedModelError(
                f"{file.paths[0]}: tensor {name} has no place in the {shape.family.name} family"
            )
