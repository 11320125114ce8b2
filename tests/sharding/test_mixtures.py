"""Models whose feed-forwards are mixtures of experts: what a file must hold, what is refused, what
they cost. Not here: their arithmetic (`kernels/test_cpu_experts.py`, `test_family_parity.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from sharding.cost import (
    ModelCosts,
    activation_bytes,
    even_depth,
    model_costs,
    packed_resident,
)
from sharding.errors import CorruptFileError, ModelFileError, UnsupportedModelError
from sharding.gguf.reader import GGUFFile
from sharding.model.arch import ModelShape, read_shape
from sharding.model_plan import Wanted, plan_model
from sharding.planner import Device
from tests.stages import chunked_logits, load_stages
from tests.tiny_gguf import tiny_model

FAMILIES = ["qwen3moe", "llama"]
of_both_families = pytest.mark.parametrize("family", FAMILIES)
ROUTER, GATE, UP, DOWN = (
    f"blk.1.{name}.weight"
    for name in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
)


def mixture(family: str = "qwen3moe", keys: Mapping[str, object] | None = None) -> GGUFFile:
    """Four layers of eight experts, of which a token takes two; `keys` of the family beside."""
    named = {f"{family}.{key}": value for key, value in (keys or {}).items()}
    return GGUFFile.from_bytes(tiny_model(family=family, experts=8, extra_metadata=named))


@of_both_families
@pytest.mark.parametrize("name", [ROUTER, GATE, UP, DOWN])
def test_a_missing_tensor_of_experts_is_named(family: str, name: str) -> None:
    file = mixture(family)
    del file.tensors[name]
    with pytest.raises(CorruptFileError, match=f"tensor {name} is missing"):
        load_stages(file, 1)


@of_both_families
@pytest.mark.parametrize("name", [ROUTER, GATE, UP, DOWN])
@pytest.mark.parametrize("count", [7, 9])
def test_a_tensor_of_other_experts_than_the_keys_say_is_named(
    family: str, name: str, count: int
) -> None:
    """More would be left out, and fewer read beyond the tensor's end."""
    file = mixture(family)
    info = file.tensors[name]
    file.tensors[name] = replace(info, shape=(*info.shape[:-1], count))
    with pytest.raises(CorruptFileError, match=rf"{name} is \[.*{count}\], .* ask for \[.*8\]"):
        load_stages(file, 1)


def test_experts_of_another_width_than_the_keys_say_are_named() -> None:
    with pytest.raises(CorruptFileError, match=r"ffn_down_exps.weight is \[96, 64, 8\], .* \[64,"):
        load_stages(mixture(keys={"expert_feed_forward_length": 64}), 1)


@of_both_families
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_used_count", 9),
        ("expert_used_count", 0),
        ("expert_used_count", None),
        ("expert_used_count", "two"),
        ("expert_count", -1),
        ("expert_count", 1 << 40),
        ("expert_feed_forward_length", -1),
    ],
)
def test_a_key_that_cannot_be_is_named(family: str, key: str, value: object) -> None:
    with pytest.raises(ModelFileError, match=f"{family}.{key}"):
        load_stages(mixture(family, {key: value}), 1)


@pytest.mark.parametrize("value", [0, None])
def test_a_family_of_mixtures_has_experts(value: object) -> None:
    with pytest.raises(CorruptFileError, match="qwen3moe.expert_count"):
        load_stages(mixture(keys={"expert_count": value}), 1)


ELSEWHERE = [
    ("expert_gating_func", 2, 1),
    ("expert_group_count", 4, 1),
    ("expert_group_used_count", 2, 0),
    ("expert_shared_count", 1, 0),
    ("expert_shared_feed_forward_length", 96, 0),
    ("expert_weights_norm", False, True),
    ("expert_weights_scale", 2.5, 1.0),
    ("interleave_moe_layer_step", 2, 1),
    ("leading_dense_block_count", 1, 0),
    ("moe_every_n_layers", 2, 1),
    ("router_logit_softcapping", 30.0, 0.0),
]


@of_both_families
@pytest.mark.parametrize(("key", "changes", "neutral"), ELSEWHERE)
def test_what_other_mixtures_do_is_refused(
    family: str, key: str, changes: object, neutral: object
) -> None:
    """Each would change every answer, and none of them would look wrong."""
    read_shape(mixture(family, {key: neutral}).metadata)
    with pytest.raises(UnsupportedModelError, match=f"{family}.{key} of {changes!r}"):
        read_shape(mixture(family, {key: changes}).metadata)


def test_a_model_without_experts_may_have_any_keys_of_them() -> None:
    file = GGUFFile.from_bytes(tiny_model(extra_metadata={"llama.expert_weights_scale": 2.5}))
    assert read_shape(file.metadata).experts == 0


def test_a_family_without_mixtures_has_none() -> None:
    file = GGUFFile.from_bytes(tiny_model(family="qwen3", extra_metadata={"qwen3.expert_count": 8}))
    with pytest.raises(UnsupportedModelError, match="qwen3 with a mixture of experts"):
        read_shape(file.metadata)


@pytest.mark.parametrize("name", ["ffn_gate_shexp.weight", "exp_probs_b.bias", "ffn_gate_inp.bias"])
def test_tensors_of_other_mixtures_are_refused(name: str) -> None:
    """Experts that every token takes, and what moves the choice."""
    file = mixture()
    file.tensors[f"blk.0.{name}"] = file.tensors["blk.0.attn_norm.weight"]
    with pytest.raises(UnsupportedModelError, match=f"blk.0.{name} has no place in the qwen3moe"):
        load_stages(file, 1)


def test_a_file_with_tensors_for_each_expert_alone_is_refused_by_name() -> None:
    """So Mixtral's first files were written."""
    file = mixture("llama")
    info = file.tensors.pop("blk.0.ffn_gate_exps.weight")
    for expert in range(8):
        name = f"blk.0.ffn_gate.{expert}.weight"
        file.tensors[name] = replace(info, name=name, shape=info.shape[:2])
    with pytest.raises(UnsupportedModelError, match=r"\(blk.0.ffn_gate.0.weight\).* convert"):
        load_stages(file, 1)


def test_experts_are_as_wide_as_their_own_key_says_or_else_as_any_feed_forward() -> None:
    shape = read_shape(mixture("qwen3moe").metadata)
    assert (shape.experts, shape.experts_used, shape.ffn) == (8, 2, 96)
    assert read_shape(mixture("llama").metadata).ffn == 96
    wider = {"feed_forward_length": 200, "expert_feed_forward_length": 96}
    assert read_shape(mixture("llama", wider).metadata).ffn == 96


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_equal_experts_are_chosen_alike_however_a_prompt_is_cut(kernels: str) -> None:
    """All router rows are equal: every token's logits tie, and the first two experts are taken."""
    file = mixture()
    file._data = [np.array(file._data[0])]  # where bytes can be changed
    for layer in range(4):
        raw = file.raw(f"blk.{layer}.ffn_gate_inp.weight")
        raw[:] = raw[0]
    tokens = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = chunked_logits(load_stages(file, 1, kernels=kernels), tokens, 40)
    assert expected.isfinite().all()
    found = chunked_logits(load_stages(file, 4, kernels=kernels), tokens, 7)
    assert torch.equal(found, expected)
    for layer in range(4):  # of the others nothing shows
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            raw = file.raw(f"blk.{layer}.{name}.weight")
            raw[len(raw) * 2 // 8 :] = 0
    found = chunked_logits(load_stages(file, 2, kernels=kernels), tokens, 40)
    assert torch.equal(found, expected)


def of_30b() -> ModelShape:
    """Qwen3-30B-A3B's."""
    return replace(
        read_shape(mixture().metadata),
        layers=48,
        hidden=2048,
        ffn=768,
        heads=32,
        kv_heads=4,
        head_dim=128,
        experts=128,
        experts_used=8,
    )


def costs(file: GGUFFile) -> ModelCosts:
    """Under the compiled kernels."""
    return model_costs(read_shape(file.metadata), file.tensors, packed_resident)


def test_a_stage_keeps_what_the_plan_counts_of_its_own_layers() -> None:
    """Every expert's bytes, whole panels of each."""
    file = mixture()
    expected = costs(file)
    for stage in load_stages(file, 3):
        spec = stage.spec
        assert stage.weights_bytes == expected.weights_bytes(spec.start, spec.stop)
    for name in (ROUTER, GATE, UP, DOWN):
        del file.tensors[name]
    with pytest.raises(CorruptFileError, match="blk.1.ffn_gate_inp.weight is missing"):
        costs(file)


def test_activations_of_a_mixture_are_counted_for_each_expert_that_a_token_takes() -> None:
    """A chunk of 512 tokens of Qwen3-30B-A3B has 4096 rows of hidden states and gates."""
    rows = 512 * 8 * (3 * 2048 + 4 * 768)
    others = 512 * (3 * 2048 + 2 * 4096 + 2 * 512 + 128)
    found = activation_bytes(of_30b(), 512, last=False, workspace_bytes=0)
    assert found == 4 * (rows + others)


def test_a_token_s_work_is_that_of_the_experts_that_it_takes() -> None:
    """Depth at which attention costs as much as all matrices: with all 128 it would be 16 times
    as deep."""
    products = 2048 * (2 * 4096 + 2 * 512 + 3 * 8 * 768 + 128)
    assert even_depth(of_30b()) == products // (2 * 4096)
    dense = replace(of_30b(), experts=0, experts_used=0, ffn=8 * 768)
    assert even_depth(dense) == 2048 * (2 * 4096 + 2 * 512 + 3 * 8 * 768) // (2 * 4096)


def test_a_gpu_s_kernels_refuse_a_mixture_and_name_the_remedy() -> None:
    """Also where "auto" chose them: they must not go on slowly somewhere else without a word."""
    devices = [Device("one", 1 << 40)]
    with pytest.raises(UnsupportedModelError, match=r"mixtures of experts .* use --kernels cpu"):
        plan_model(mixture(), devices, Wanted(kernels="triton"))
    assert plan_model(mixture(), devices, Wanted(kernels="cpu")).kernels == "cpu"


def test_the_triton_kernels_themselves_refuse_a_mixture() -> None:
    """Whoever made the plan."""
    pytest.importorskip("triton")
    from sharding.kernels.triton import TritonKernels

    kernels = object.__new__(TritonKernels)
    with pytest.raises(UnsupportedModelError, match="use --kernels cpu"):
        kernels.pack_experts(mixture(), [GATE, UP])
