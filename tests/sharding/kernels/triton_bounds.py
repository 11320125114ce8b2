"""How far the Triton kernels may be from float64, as docs/numerics.md derives it ("On GPUs").

As in `bounds.py` nothing is fitted, and every function returns `(truth, bound)`. Sums are bounded
in any order, each addition by 2u where tensor cores truncate.

    T tokens, I inputs, O outputs, D head dim, N slots
"""

from __future__ import annotations

import torch

from sharding.kernels.planes import BLOCK
from sharding.kernels.triton_products import FEW_TOKENS
from sharding.kernels.triton_weights import Part
from sharding.model.arch import Activation
from sharding.model.attention import Rows
from sharding.model.kv_cache import LayerPages
from tests.sharding.kernels import bounds
from tests.sharding.kernels.bounds import TINY, ExactWeight, U, gamma

U16 = 2.0**-11  # unit roundoff of FP16
HALF_TINY = 2.0**-25  # what rounding to a subnormal FP16 may lose
CUTS = 64  # more than a row of the tests' matrices is cut into


def matmul(
    x_TI: torch.Tensor,
    weight: ExactWeight,
    part: Part,
    residual_TO: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the way that so many tokens take."""
    x, cols = x_TI.double(), x_TI.shape[1]
    residual = torch.zeros(1) if residual_TO is None else residual_TO.double()
    truth_TO = x @ weight.values_OI.T + residual
    # Activations are scaled by powers of two that bring the largest of a row below 2^14.
    unit_T1 = x.abs().amax(-1, keepdim=True) * 2.0**-13
    planes = part.planes
    if len(x_TI) <= FEW_TOKENS and planes.quantised:
        dx = fixed_point_error(x)
        off_TO = dx @ weight.size_OI.T
        # Products of digits are exact; digits are at most three times as large as what they make.
        summed_TO = 3 * (x.abs() + dx) @ weight.size_OI.T + residual.abs()
        chain = 4 * planes.padded(cols) // planes.unit
        return truth_TO, off_TO + gamma(chain + CUTS + 8) * summed_TO + cols * TINY
    if len(x_TI) <= FEW_TOKENS:
        dx = 2.0**-22 * x.abs() + HALF_TINY * unit_T1
        dw = 2.0**-22 * weight.size_OI + HALF_TINY * part.headroom
        off_TO = x.abs() @ dw.T + dx @ (weight.size_OI + dw).T
        summed_TO = (x.abs() + dx) @ (weight.size_OI + dw).T + residual.abs()
        return truth_TO, off_TO + gamma(4 * cols + CUTS + 6) * summed_TO + cols * TINY
    # Weights are scaled likewise, and both are halves.
    dx = U16 * x.abs() + HALF_TINY * unit_T1
    dw = (U16 + 2 * U) * weight.size_OI + HALF_TINY * part.headroom
    off_TO = x.abs() @ dw.T + dx @ (weight.size_OI + dw).T
    summed_TO = (x.abs() + dx) @ (weight.size_OI + dw).T + residual.abs()
    return truth_TO, off_TO + gamma(2 * cols + 4) * summed_TO + cols * TINY


def fixed_point_error(x: torch.Tensor) -> torch.Tensor:
    """Of activations as integers of 22 bits times a power of two for each block: half a unit."""
    blocks = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(1)[:, : x.shape[1]]
    return torch.maximum(largest * 2.0**-22, torch.tensor(2.0**-127)) * (1 + 2.0**-20)


def embedding(weight: ExactWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """A product and a sum, fused or not."""
    return weight.values_OI, gamma(2) * weight.size_OI + 2 * TINY


def exp_error(x: torch.Tensor) -> torch.Tensor:
    """Relative, of e^x as 2^(x log2 e): the rounded product, and 2 units of the instruction."""
    return (2 * x.abs() + 4) * U


def gated(
    gate_up_T2F: torch.Tensor, activation: Activation = "silu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """e^-by, an addition, a division, a product; 2^-121 where e^-by is beyond float32."""
    gate, up = gate_up_T2F.double().chunk(2, dim=-1)
    by, off = bounds.sigmoid_of(gate, activation)
    truth = gate * torch.sigmoid(by) * up
    relative = torch.expm1(exp_error(by) + off) + gamma(4)
    return truth, relative * truth.abs() + 2.0**-121 * up.abs() + TINY * (1 + up.abs())


def attention(
    q_THD: torch.Tensor, rows: Rows, pages: LayerPages, window: int, fine: bool, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One segment's attention `[T, H, D]`, in so many steps of slots (parts count as steps)."""
    exact = bounds.exact_attention(q_THD, rows, pages, window)
    dim, length = q_THD.shape[-1], rows.position + len(q_THD)
    # Queries are halves, or two of them; each adds to a sum of D products.
    halves, rounding = (2, 2.0**-22) if fine else (1, U16)
    off = (rounding + gamma(2 * halves * dim + 4)) * exact.score_sizes()
    off = off + dim * HALF_TINY * float(exact.k.abs().max())
    # What a weight is off by: its score, the roundings of what 2 is raised to, every 2^x, its half.
    fall = exact.fall(off) + 14
    weight_error = torch.expm1(off + 4 * U * fall + (steps + 2) * 4 * U + rounding)
    adding = gamma(2 * halves * min(length, window or length) + 4 * steps + 8)
    return exact.mixed(weight_error, adding, length * 2.0**-38 * (exact.v.abs().max() + 1))


def library_attention(q_THD: torch.Tensor, rows: Rows, pages: LayerPages) -> torch.Tensor:
    """What a library's part adds, `[T, H, D]`: its result is FP16, and so are its weights, at most
    1, of which each may lose what rounding to a subnormal does."""
    exact = bounds.exact_attention(q_THD, rows, pages, 0)
    length = rows.position + len(q_THD)
    largest = exact.v.abs().max() + 1
    zero = torch.zeros_like(exact.scores)
    _, halved = exact.mixed(zero + 2 * U16, 0.0, (length + 1) * HALF_TINY * largest)
    return halved
