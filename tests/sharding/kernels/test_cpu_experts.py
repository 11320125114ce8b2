"""Mixtures of experts: within derived bounds of float64, the same bits for a token in any company,
and a choice of experts that never depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.cost import packed_resident
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels
from sharding.kernels.block_weights import ExpertWeights
from sharding.kernels.cpu import use_threads
from sharding.kernels.experts import choose_experts, mix_experts
from sharding.kernels.reference import ReferenceKernels
from tests.sharding.kernels import bounds
from tests.sharding.kernels.instruction_sets import KERNELS
from tests.sharding.kernels.mixture_bounds import ExactExperts, mixture
from tests.sharding.kernels.world import FORMAT_NAMES, normal, random_raw, same
from tests.tiny_gguf import write_gguf

REFERENCE = ReferenceKernels()
on_every_instruction_set = pytest.mark.parametrize("isa", KERNELS)
HIDDEN, FFN, EXPERTS = 256, 256, 9
GATE_UP = ["gate", "up"]


def file_of(gate_up: str, down: str, router_EI: torch.Tensor | None = None) -> GGUFFile:
    """Nine experts of those formats; the router's logits are about 1."""
    wide = {
        name: (gate_up, random_raw(gate_up, FFN * EXPERTS, HIDDEN, seed), (HIDDEN, FFN, EXPERTS))
        for seed, name in enumerate(GATE_UP)
    }
    narrow = random_raw(down, HIDDEN * EXPERTS, FFN, seed=2)
    router_EI = normal(EXPERTS, HIDDEN, seed=5) / 16 if router_EI is None else router_EI
    tensors = {
        **{name: (raw, shape, format) for name, (format, raw, shape) in wide.items()},
        "down": (narrow, (FFN, HIDDEN, EXPERTS), down),
        "router": (router_EI.numpy(), router_EI.T.shape, "F32"),
    }
    return GGUFFile.from_bytes(write_gguf({}, tensors))


def packed(kernels: Kernels, file: GGUFFile, used: int) -> ExpertWeights:
    """As a block has them."""
    return ExpertWeights(
        kernels.pack(file, ["router"]),
        kernels.pack_experts(file, GATE_UP),
        kernels.pack_experts(file, ["down"]),
        used,
    )


def exact(file: GGUFFile, used: int) -> ExactExperts:
    """The same without a rounding."""

    def parts(name: str) -> list[np.ndarray]:
        return np.split(file.raw(name), EXPERTS)

    def weight(name: str, raw: np.ndarray) -> bounds.ExactWeight:
        return bounds.exact_weight(file.tensors[name].format.name, raw)

    both = [np.concatenate(pair) for pair in zip(*map(parts, GATE_UP), strict=True)]
    return ExactExperts(
        weight("router", file.raw("router")),
        [weight("gate", raw) for raw in both],
        [weight("down", raw) for raw in parts("down")],
        used,
    )


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_mixture_is_within_its_bound(name: str) -> None:
    """On every instruction set and in the slow twin; one token, a few, and some for each expert."""
    file = file_of(name, "Q8_0")
    for tokens in (1, 3, 40):
        x_TI, residual_TI = normal(tokens, HIDDEN) / 8, normal(tokens, HIDDEN, seed=3)
        for isa, kernels in KERNELS.items():
            found = kernels.mix_experts(x_TI, packed(kernels, file, 3), "silu", residual_TI)
            multiply = partial(bounds.matmul, isa)
            truth, bound = mixture(multiply, x_TI, exact(file, 3), residual_TI)
            assert ((found.double() - truth).abs() <= bound).all(), isa
        found = REFERENCE.mix_experts(x_TI, packed(REFERENCE, file, 3), "silu", residual_TI)
        truth, bound = mixture(bounds.reference_matmul, x_TI, exact(file, 3), residual_TI)
        assert ((found.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("off", [1 + 2.0**-10, 1 - 2.0**-10])
def test_the_bound_of_a_mixture_is_not_a_formality(off: float) -> None:
    """Shares rounded to 11 bits on the way would be found out."""
    file, x_TI = file_of("Q8_0", "Q8_0"), normal(4, HIDDEN) / 8
    truth, bound = mixture(
        partial(bounds.matmul, "avx2"), x_TI, exact(file, 3), torch.zeros(4, HIDDEN)
    )
    assert ((truth * off - truth).abs() > bound).any()


MIXTURES = [("Q4_K", "Q6_K"), ("Q4_1", "F16"), ("F32", "Q8_0"), ("IQ4_XS", "Q5_K")]
on_mixtures = pytest.mark.parametrize("formats", MIXTURES, ids="-".join)


@on_every_instruction_set
@on_mixtures
@pytest.mark.parametrize("used", [1, 2, 8, 9])
def test_a_token_of_a_mixture_is_the_same_in_any_company(
    isa: str, formats: tuple[str, str], used: int
) -> None:
    """On any number of threads, put together step by step or in one call."""
    kernels = KERNELS[isa]
    experts = packed(kernels, file_of(*formats), used)
    x_TI, residual_TI = normal(70, HIDDEN), normal(70, HIDDEN, seed=3)
    x_TI[40:60] = x_TI[40]  # so that one expert has many of them
    use_threads(1)
    alone = [
        kernels.mix_experts(x_TI[t : t + 1], experts, "silu", residual_TI[t : t + 1])
        for t in range(70)
    ]
    expected = torch.cat(alone)
    assert same(mix_experts(kernels, x_TI, experts, "silu", residual_TI), expected)
    for threads in (1, 2, 3, 8):
        use_threads(threads)
        for part in (slice(0, 1), slice(0, 2), slice(3, 16), slice(40, 60), slice(0, 70)):
            found = kernels.mix_experts(x_TI[part], experts, "silu", residual_TI[part])
            assert same(found, expected[part]), (threads, part)


@on_every_instruction_set
def test_a_mixture_without_a_residual_is_one_on_top_of_zeros(isa: str) -> None:
    kernels = KERNELS[isa]
    experts, x_TI = packed(kernels, file_of("Q4_1", "Q8_0"), 2), normal(5, HIDDEN)
    on_zeros = kernels.mix_experts(x_TI, experts, "gelu", torch.zeros(5, HIDDEN))
    assert same(kernels.mix_experts(x_TI, experts, "gelu"), on_zeros)
    assert same(mix_experts(kernels, x_TI, experts, "gelu", None), on_zeros)
    assert kernels.mix_experts(x_TI[:0], experts).shape == (0, HIDDEN)


LOGITS = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 0.5000001, 2.0, 88.0, -200.0, 1e30])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(LOGITS, min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=5),
    st.integers(1, EXPERTS),
)
def test_any_logits_choose_the_same_experts(rows: list[list[float]], used: int) -> None:
    """Equal ones too: the router hands the first numbers of a token through. Another choice would
    be another sum."""
    file = file_of("Q8_0", "Q8_0", torch.eye(EXPERTS, HIDDEN))
    x_TI = normal(len(rows), HIDDEN)
    x_TI[:, :EXPERTS] = torch.tensor(rows)
    for kernels in KERNELS.values():
        experts = packed(kernels, file, used)
        expected = mix_experts(kernels, x_TI, experts, "silu", None)
        assert same(kernels.mix_experts(x_TI, experts), expected)


def test_of_equal_logits_the_first_are_chosen() -> None:
    logits_TE = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0], [0.0, -0.0, 0.0, -1.0, 0.0]])
    ids_TU, weights_TU = choose_experts(logits_TE, 2)
    assert ids_TU.tolist() == [[1, 3], [0, 1]]
    assert weights_TU.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_weights_are_the_softmax_over_all_divided_by_what_the_chosen_have_of_it() -> None:
    logits_TE = normal(30, 16) * 3
    ids_TU, weights_TU = choose_experts(logits_TE, 4)
    best = logits_TE.double().softmax(-1).topk(4)
    assert torch.equal(best.indices.sort(-1).values, ids_TU)
    shares = logits_TE.double().softmax(-1).gather(1, ids_TU)
    expected = shares / shares.sum(-1, keepdim=True)
    assert ((weights_TU - expected).abs() <= 2 * bounds.U * expected).all()


def _chosen(logits_TE: torch.Tensor, used: int) -> set[int]:
    return {*choose_experts(logits_TE, used)[0].flatten().tolist()}


@pytest.mark.parametrize("kernels", [*KERNELS.values(), REFERENCE], ids=[*KERNELS, "reference"])
def test_an_expert_that_no_token_takes_is_not_computed(kernels: Kernels) -> None:
    """Its weights are infinite, which would show even in a share of zero."""
    x_TI = normal(2, HIDDEN) / 8
    file, spoilt = file_of("F16", "F16"), file_of("F16", "F16")
    taken = _chosen(kernels.matmul(x_TI, packed(kernels, file, 2).router), 2)
    idle: Sequence[int] = sorted({*range(EXPERTS)} - taken)
    assert idle
    for name in (*GATE_UP, "down"):
        raw = np.split(spoilt.raw(name), EXPERTS)
        info = spoilt.tensors[name]
        data = np.frombuffer(bytes(spoilt._data[0]), np.uint8).copy()
        for expert in idle:
            first = info.offset + expert * raw[0].size
            data[first : first + raw[0].size] = np.frombuffer(b"\x00\x7c", np.uint8)[
                np.arange(raw[0].size) % 2
            ]
        spoilt._data = [data]
    found = kernels.mix_experts(x_TI, packed(kernels, spoilt, 2))
    assert found.isfinite().all()
    assert torch.equal(found, kernels.mix_experts(x_TI, packed(kernels, file, 2)))


@on_every_instruction_set
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_its_own_row_of_a_mixture_only(
    isa: str, bad: float
) -> None:
    kernels = KERNELS[isa]
    experts = packed(kernels, file_of("Q4_1", "Q8_0"), 3)
    for tokens in (1, 2, 13):
        x_TI = normal(tokens, HIDDEN)
        expected = kernels.mix_experts(x_TI, experts)
        x_TI[tokens // 2, 77] = bad
        found = kernels.mix_experts(x_TI, experts)
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(found[others], expected[others])
        assert not found[tokens // 2].isfinite().any()


@pytest.mark.parametrize("kernels", [*KERNELS.values(), REFERENCE], ids=[*KERNELS, "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_router_that_is_not_finite_shows(kernels: Kernels, bad: float) -> None:
    """Of one expert alone: passed over, it would change answers unseen."""
    router_EI = normal(EXPERTS, HIDDEN) / 16
    router_EI[7, 3] = bad
    experts = packed(kernels, file_of("Q4_1", "Q8_0", router_EI), 2)
    assert kernels.mix_experts(normal(3, HIDDEN), experts).isnan().all()


@on_every_instruction_set
def test_packed_experts_are_what_the_planner_counts(isa: str) -> None:
    """Each has whole panels of its own, also where its rows are no multiple of 16."""
    raw = random_raw("Q4_K", 3 * 20, HIDDEN)
    file = GGUFFile.from_bytes(write_gguf({}, {"w": (raw, (HIDDEN, 20, 3), "Q4_K")}))
    weights = KERNELS[isa].pack_experts(file, ["w"])
    assert [(weight.rows, weight.cols) for weight in weights] == [(20, HIDDEN)] * 3
    assert sum(weight.n_bytes for weight in weights) == packed_resident(file.tensors["w"])
    plain = KERNELS[isa].pack(file, ["w"])
    rows = [KERNELS[isa].embed(weight, range(20)) for weight in weights]
    assert torch.equal(torch.cat(rows), KERNELS[isa].embed(plain, range(60)))
