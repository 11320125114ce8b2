"""A plan for a model file on real devices, with the defaults that a user did not choose.

Not here: the division itself (`planner.py`). Neither torch nor ray, so that `longspan plan` answers
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharding.batch import CHUNK
from sharding.cost import (
    WORKSPACE_BYTES,
    even_depth,
    fp32_resident,
    gpu_workspace_bytes,
    model_costs,
    packed_resident,
)
from sharding.errors import ConfigError, UnsupportedModelError
from sharding.gguf.reader import GGUFFile, TensorInfo
from sharding.kernels import cpu_kernels
from sharding.kernels.planes import NO_MIXTURES, planes_resident
from sharding.model.arch import read_shape
from sharding.model.rotation import Stretch
from sharding.model.tensors import check_tensors
from sharding.planner import Device, Plan, largest_context, make_plan

CONTEXTS_HELD = 32
"""KV is reserved for up to so many full contexts, if memory allows: that many requests run at
once, even if none says how long its answer may become. On a host unused pages take no memory."""

RESIDENT: dict[str, Callable[[TensorInfo], int]] = {
    "cpu": packed_resident,
    "reference": fp32_resident,
    "triton": planes_resident,
}
"""What each kernel set keeps of a tensor. Here, not in the sets: planning must not import torch."""

CHUNKS = {"cpu": CHUNK, "reference": CHUNK, "triton": 4096}
"""Most tokens of a step where the user chose none. A GPU needs thousands to be busy; on a CPU they
would only make others wait."""


@dataclass(frozen=True)
class ModelPlan:
    """A plan whose `plan.kv_tokens` serve requests of up to `context` tokens each.

    `kernels`: the kernel set that it counts on, on every device. `chunk`: most tokens of a step.
    `even_depth`: see `sharding.cost`. `stretch`: what was wanted.
    """

    plan: Plan
    context: int
    max_context: int
    train_context: int
    kernels: str
    chunk: int
    even_depth: int
    stretch: Stretch | None = None


@dataclass(frozen=True)
class Wanted:
    """What a user asked for; None leaves it to the model and the memory.

    `contexts`: how many of them the KV holds, if memory allows, where `kv_tokens` is None.
    `kernels` "auto" is a CPU's set here; whoever can look for GPUs decides before. `stretch`:
    rotary scaling in place of the file's.
    """

    context: int | None = None
    kv_tokens: int | None = None
    kernels: str = "auto"
    chunk: int | None = None
    contexts: int = CONTEXTS_HELD
    stretch: Stretch | None = None


def plan_model(file: GGUFFile, devices: Sequence[Device], wanted: Wanted) -> ModelPlan:
    """Divide the model of a file over devices.

    By default the context is the one the model was trained for, or what fits; the KV holds
    `wanted.contexts` of them, or what fits. Raises `DoesNotFitError` with the largest context that
    would, `ModelFileError`.
    """
    shape = read_shape(file.metadata, wanted.stretch)
    check_tensors(file, shape)
    kernels = cpu_kernels() if wanted.kernels == "auto" else wanted.kernels
    chunk = wanted.chunk or CHUNKS[kernels]
    on_gpu = kernels == "triton"
    if on_gpu and shape.experts:
        raise UnsupportedModelError(f"{file.paths[0]}: {NO_MIXTURES}")
    workspace_bytes = gpu_workspace_bytes(shape, chunk) if on_gpu else WORKSPACE_BYTES
    costs = model_costs(shape, file.tensors, RESIDENT[kernels], workspace_bytes)
    largest = largest_context(costs, devices, chunk)
    context = wanted.context or max(1, min(shape.train_context, largest))
    room = largest_context(costs, devices, chunk, context)
    kv_tokens = wanted.kv_tokens or max(context, min(room, wanted.contexts * context))
    if kv_tokens < context:
        raise ConfigError(
            f"kv_tokens of {kv_tokens} cannot hold one context of {context}; "
            "raise it or lower the context"
        )
    plan = make_plan(costs, devices, kv_tokens, chunk, context)
    return ModelPlan(
        plan,
        context,
        largest,
        shape.train_context,
        kernels,
        chunk,
        even_depth(shape),
        wanted.stretch,
    )
