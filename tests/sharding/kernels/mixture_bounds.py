"""What float64 gives for a mixture of experts, and how far a float32 kernel may be from it, as
docs/numerics.md derives it step by step. Not here: products and gates alone (`bounds.py`).

    T tokens, E experts, U experts that a token takes, I hidden size, F an expert's width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.sharding.kernels.bounds import EXP_ERROR, TINY, ExactWeight, U, gamma, gated

Bounded = tuple[torch.Tensor, torch.Tensor]
Multiply = Callable[[torch.Tensor, ExactWeight], Bounded]
"""Truth and bound of a product, of the kernels at hand."""

_STEEPEST = 1.1  # of SiLU


@dataclass(frozen=True)
class ExactExperts:
    """A router `[E, I]`, and each expert's `[2F, I]` and `[I, F]`."""

    router: ExactWeight
    gate_up: Sequence[ExactWeight]
    down: Sequence[ExactWeight]
    used: int


def mixture(
    multiply: Multiply, x_TI: torch.Tensor, experts: ExactExperts, residual_TI: torch.Tensor
) -> Bounded:
    """Of tokens whose choice of experts no error within the bounds could turn."""
    logits_TE, off_TE = multiply(x_TI, experts.router)
    weights_TE, weights_off_TE = _weights(logits_TE, off_TE, experts.used)
    truth = residual_TI.double()
    size, carried = truth.abs(), torch.zeros_like(truth)
    for expert in range(len(experts.gate_up)):
        w, dw = weights_TE[:, expert, None], weights_off_TE[:, expert, None]
        z, dz = _expert(multiply, x_TI, experts.gate_up[expert], experts.down[expert])
        truth = truth + w * z
        size = size + (w + dw) * (z.abs() + dz)
        carried = carried + dw * z.abs() + (w + dw) * dz
    return truth, carried + gamma(experts.used + 1) * size + experts.used * TINY


def _weights(logits_TE: torch.Tensor, off_TE: torch.Tensor, used: int) -> Bounded:
    """Powers of what is off by twice a logit's error at most, in float64, rounded once."""
    ranked_TE = logits_TE.sort(dim=-1, descending=True).values
    most_off_T = off_TE.amax(-1)
    assert (ranked_TE[:, used - 1] - ranked_TE[:, used] > 2 * most_off_T).all(), "a close choice"
    chosen_TE = logits_TE >= ranked_TE[:, used - 1, None]
    weights_TE = logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
    relative_T1 = torch.expm1(2 * most_off_T[:, None]) + 2 * U
    return weights_TE, (weights_TE * relative_T1 + TINY) * chosen_TE


def _expert(
    multiply: Multiply, x_TI: torch.Tensor, gate_up: ExactWeight, down: ExactWeight
) -> Bounded:
    """Each step passes on what the one before is off by."""
    both_T2F, both_off_T2F = multiply(x_TI, gate_up)
    (gate, up), (gate_off, up_off) = both_T2F.chunk(2, -1), both_off_T2F.chunk(2, -1)
    activated = gate * torch.sigmoid(gate)
    steep = _STEEPEST * gate_off
    passed = (activated.abs() + steep) * up_off + steep * up.abs()
    truth, own = gated(both_T2F)
    # The gate's own error is relative to what it got, which is off itself.
    off = own + passed * (1 + gamma(EXP_ERROR / U + 4)) + 2.0**-120 * up_off
    _, rounded = multiply(truth.abs() + off, down)
    return truth @ down.values_OI.T, rounded + off @ down.values_OI.abs().T
