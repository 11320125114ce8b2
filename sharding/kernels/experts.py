"""Mixtures of experts put together from a kernel set's single steps, and the choice of experts.

The reference computes this way; the compiled set has its own (`csrc/experts.cpp`) and is held to
this bit for bit.

    T tokens, E experts, U experts that a token takes, I hidden size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sharding.kernels import Kernels
    from sharding.kernels.block_weights import ExpertWeights
    from sharding.model.arch import Activation


def choose_experts(logits_TE: torch.Tensor, used: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, ascending, `[T, U]` int64, and their weights, `[T, U]` float32.

    The largest logits, the first of equals; the weights are the softmax over the chosen. A token
    with a logit that is not finite has NaN for weights: one that was passed over could not show.
    """
    order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
    ids_TU = order_TE[:, :used].sort(dim=-1).values
    chosen_TU = logits_TE.gather(1, ids_TU).double()
    powers_TU = (chosen_TU - chosen_TU.amax(-1, keepdim=True)).exp()
    total_T = torch.zeros(len(logits_TE), dtype=torch.float64)
    for powers_T in powers_TU.unbind(1):
        total_T = total_T + powers_T
    weights_TU = (powers_TU / total_T[:, None]).float()
    broken_T1 = ~logits_TE.isfinite().all(-1, keepdim=True)
    first_U = torch.arange(used)
    return torch.where(broken_T1, first_U, ids_TU), weights_TU.masked_fill(broken_T1, torch.nan)


def mix_experts(
    kernels: Kernels,
    x_TI: torch.Tensor,
    experts: ExpertWeights,
    activation: Activation,
    residual_TI: torch.Tensor | None,
) -> torch.Tensor:
    """Expert after expert, each for its tokens; a product is rounded before it is added."""
    ids_TU, weights_TU = choose_experts(kernels.matmul(x_TI, experts.router), experts.used)
    mixed_TI = torch.zeros_like(x_TI) if residual_TI is None else residual_TI.clone()
    for expert in ids_TU.unique().tolist():
        tokens, places = (ids_TU == expert).nonzero(as_tuple=True)
        both_N2F = kernels.matmul(x_TI[tokens], experts.gate_up[expert])
        gated_NF = kernels.gated(both_N2F, activation)
        out_NI = kernels.matmul(gated_NF, experts.down[expert])
        mixed_TI[tokens] += weights_TU[tokens, places, None] * out_NI
    return mixed_TI
