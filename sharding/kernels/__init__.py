"""The kernel contract: what a stage asks of the arithmetic under it, and the choice of one set at
load.

    T tokens of a batch, I inputs, O outputs, V vocabulary, H query heads, G kv heads, D head dim,
    R rotary pairs of a head, N rotations of a model, F feed-forward width, P pages, S slots a page,
    X all heads of a token, one after the other

Activations are float32, contiguous, row-major. KV pages are FP16: keys `[P, G, D, S]` so that
vector lanes run over slots, values `[P, G, S, D]`. On CPUs every output element is reduced in one
fixed order, whatever T is and whatever else is in the batch: chunks, batches and stages must not
show in the logits. On GPUs a set says in docs/numerics.md what may show, and how far. Nothing here
may keep a request's state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from sharding.errors import ConfigError, StageError
from sharding.kernels.block_weights import PLAIN_HEADS
from sharding.memory import available_bytes

log = logging.getLogger("longspan.kernels")

KERNEL_SETS = ("cpu", "reference", "triton")

# Shares of free memory that stages may plan with. The rest is for Ray, Serve and the system; on a
# GPU for what its driver takes for each kernel and library that is loaded.
_HOST_SHARE = 0.8
_GPU_SHARE = 0.9

if TYPE_CHECKING:
    import torch

    from sharding.batch import Choice, SamplingParams
    from sharding.gguf.reader import GGUFFile
    from sharding.kernels.block_weights import BlockWeights, ExpertWeights, HeadWeights
    from sharding.model.arch import Activation
    from sharding.model.attention import BatchIndex
    from sharding.model.kv_cache import LayerPages
    from sharding.model.sampling import History


class Weight(Protocol):
    """A quantised matrix `[rows, cols]` in the layout that its kernel set likes."""

    @property
    def rows(self) -> int:
        """Outputs."""

    @property
    def cols(self) -> int:
        """Inputs."""

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""


class Layers(Protocol):
    """Decoder blocks bound to a kernel set and to their pages."""

    def run(
        self, x_TI: torch.Tensor, index: BatchIndex, wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Hidden states `[T, I]` after all blocks; writes the batch's keys and values.

        Of each block: `x += attention(rms_norm(x) @ qkv.T) @ attn_output.T`, then
        `x += gated(rms_norm(x) @ gate_up.T) @ down.T`, or a mixture of experts; what is added
        normed first where the block has post norms. With `wanted`, ascending, only those rows come
        back: the last block need not compute more of the others than keys and values. `x_TI` may be
        overwritten, and may be what comes back.
        """


class Head(Protocol):
    """The output norm and matrix, bound to a kernel set."""

    def logits(self, x_TI: torch.Tensor) -> torch.Tensor:
        """`rms_norm(x) @ weight.T`, `[T, V]`."""

    def likeliest(self, x_TI: torch.Tensor) -> list[int]:
        """The id of each row's largest logit, the lowest of equals; -1 for a row with one that is
        not finite."""


class Kernels(Protocol):
    """One kernel set. Every method is a pure function but `rotate_and_store`."""

    name: str

    device: torch.device
    """Where its weights, pages, activations and results are."""

    failures: tuple[type[Exception], ...]
    """What its calls may raise for a batch that cannot be computed."""

    def pack(self, file: GGUFFile, names: Sequence[str]) -> Weight:
        """Load tensors of equal `cols`, stacked by rows, in the order of `names`.

        Raises `UnsupportedModelError` for a quantisation format that this set does not compute.
        """

    def pack_experts(self, file: GGUFFile, names: Sequence[str]) -> Sequence[Weight]:
        """Load tensors `[cols, rows, experts]`: of each expert its matrices, stacked by rows in the
        order of `names`.

        Raises `UnsupportedModelError` as `pack` does, and where this set computes no mixtures.
        """

    def embed(
        self, weight: Weight, ids: Sequence[int], out_TI: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows `ids` of the weight, `[T, I]`; `out_TI` may be used for them.

        Raises `IndexError` for a row there is not.
        """

    def matmul(
        self, x_TI: torch.Tensor, weight: Weight, residual_TO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`residual + x @ weight.T`, `[T, O]`; the residual is added last."""

    def rms_norm(
        self,
        x_TI: torch.Tensor,
        scale_I: torch.Tensor,
        eps: float,
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`residual + x / sqrt(mean(x^2) + eps) * scale`, row by row (Zhang and Sennrich, 2019)."""

    def rotate_and_store(
        self,
        qkv_TX: torch.Tensor,
        index: BatchIndex,
        pages: LayerPages,
        heads: HeadWeights = PLAIN_HEADS,
    ) -> torch.Tensor:
        """Split `[T, (H + 2G) * D]`; return the turned queries `[T, H * D]`, store keys and values.

        After what `heads` says, the first 2R elements of each query and key head turn by that
        rotation's `index.cos_NTR` and `sin_NTR`; keys and values go to each token's page and slot
        as FP16.
        """

    def attention(
        self, q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int = 0
    ) -> torch.Tensor:
        """Causal attention of each token over its request's slots so far, `[T, H * D]`.

        Scores are scaled by `1/sqrt(D)`; the batch's own keys and values are stored already. With a
        `window` a token sees only so many slots, its own the last of them.
        """

    def gated(self, gate_up_T2F: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """`activation(gate) * up`, `[T, F]` (Shazeer, 2020). "gelu" is its approximation by tanh
        (Hendrycks and Gimpel, 2016), as those models were trained with."""

    def mix_experts(
        self,
        x_TI: torch.Tensor,
        experts: ExpertWeights,
        activation: Activation = "silu",
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`residual + sum of weight * gated(x @ gate_up.T) @ down.T`, `[T, I]`, over the experts
        that each token takes, in ascending order (Shazeer and others, 2017).

        Those are the largest of `x @ router.T`, the first of equals, and their weights the softmax
        over them alone: the same as one over all, divided by what the chosen have of it.
        """

    def draw(
        self,
        logits_V: torch.Tensor,
        params: SamplingParams,
        position: int,
        drawn: int,
        history: History | None,
    ) -> int:
        """The id that `sharding.model.sampling.draw` draws, which explains the arguments.

        Raises `StageError` as that does.
        """

    def score(
        self, logits_TV: torch.Tensor, targets: Sequence[int], alternatives: int
    ) -> list[Choice]:
        """As `sharding.model.sampling.score`."""

    def works(self) -> bool:
        """Whether its device computes: a GPU that failed in use fails every later call of the
        process."""

    def layers(self, weights: Sequence[BlockWeights], pages: Sequence[LayerPages]) -> Layers:
        """Blocks with their pages, ready to run one after the other."""

    def head(self, norm_I: torch.Tensor, eps: float, weight: Weight) -> Head:
        """What follows the last block."""


def load_kernels(name: str) -> Kernels:
    """The kernel set of that name. Raises `ConfigError` for one that is unknown or not built."""
    if name == "cpu":
        from sharding.kernels.cpu import CPUKernels

        return CPUKernels()
    if name == "reference":
        from sharding.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name == "triton":
        from sharding.kernels.triton import TritonKernels

        return TritonKernels()
    raise ConfigError(f"no kernel set {name!r}; there are: {', '.join(KERNEL_SETS)}")


def cpu_kernels() -> str:
    """The kernel set for a CPU: the compiled one, or the reference where it was not built."""
    return "cpu" if find_spec("sharding.kernels._cpu") else "reference"


def built_for_gpus() -> bool:
    """Whether this installation could compute on a GPU, if there were one."""
    import torch

    return torch.version.cuda is not None and find_spec("triton") is not None


def best_kernels() -> str:
    """What "auto" is for stages of this process: Triton's where a GPU computes them, else the
    CPU's. A warning says why an installation for GPUs computes on the CPU."""
    if built_for_gpus():
        try:
            if _gpu() is not None:
                return "triton"
        except (ConfigError, StageError) as error:
            log.warning("computing on the CPU: %s", error)
    return cpu_kernels()


@dataclass(frozen=True)
class DeviceFacts:
    """Where stages of a kernel set compute, seen from one of their processes.

    `identity` tells a machine's devices apart, whatever number a process knows them by.
    `usable_bytes` are for all stages on the device together.
    """

    name: str
    identity: str
    usable_bytes: int


def device_facts(kernels: str) -> DeviceFacts:
    """The device that this process would compute on. Raises `ConfigError` if a GPU is wanted and
    none can be used, `StageError` if it fails."""
    gpu = _gpu() if kernels == "triton" else None
    if gpu is None:
        return DeviceFacts("cpu", "cpu", int(available_bytes() * _HOST_SHARE))
    import torch

    from sharding.kernels.triton import failing_gpu

    try:
        properties = torch.cuda.get_device_properties(gpu)
        free, _ = torch.cuda.mem_get_info(gpu)
    except RuntimeError as error:
        raise failing_gpu(error) from error
    return DeviceFacts(properties.name, str(properties.uuid), int(free * _GPU_SHARE))


def _gpu() -> torch.device | None:
    """The GPU of the Triton kernels, on which one ran; None when they are interpreted."""
    device = load_kernels("triton").device
    return device if device.type == "cuda" else None


def use_threads(threads: int, kernels: str) -> None:
    """Compute on so many cores of this process with that kernel set.

    The compiled kernels have threads of their own; torch's would only spin beside them.
    """
    import torch

    if kernels == "cpu":
        from sharding.kernels.cpu import use_threads as use_own_threads

        use_own_threads(threads)
        threads = 1
    torch.set_num_threads(threads)


def take_cores(kernels: str) -> None:
    """This thread calls the kernels from now on: it and their own threads keep to one core each, if
    they are as many as the cores of this process.

    Left alone, Linux often wakes a kernel's thread up on the core where its caller computes, while
    something short runs on the other: 4% of a decoded token on two cores.
    """
    if kernels == "cpu":
        from sharding.kernels.cpu import take_cores as take_own_cores

        take_own_cores()
