"""The Triton kernels as a set: for NVIDIA GPUs, and for tests in Triton's interpreter.

Chosen by name; nothing falls back to it or from it. With TRITON_INTERPRET=1 in the environment,
which Triton reads when the kernels are imported, the same kernels are interpreted on the CPU:
right, and ten thousand times slower.

Not here: the arithmetic (`triton_matmul.py`, `triton_attention.py`, `triton_rows.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from subprocess import SubprocessError
from typing import TYPE_CHECKING

import torch

from sharding.errors import COMPUTING_FAILED, ConfigError, StageError, UnsupportedModelError
from sharding.kernels.block_weights import PLAIN_HEADS
from sharding.kernels.composed import ComposedHead
from sharding.kernels.planes import NO_MIXTURES, PLANES

try:
    import triton
    from triton.errors import TritonError
except ImportError as missing:
    raise ConfigError(
        f"--kernels triton: {missing}; Triton comes with a torch built for CUDA, or as the package "
        "`triton` (Linux only)"
    ) from missing

from sharding.kernels import triton_attention, triton_products, triton_rows
from sharding.kernels.triton_layers import FusedLayers, GraphedLayers
from sharding.kernels.triton_plan import (
    HOPPER,
    INTERPRETED,
    Items,
    Tiles,
    Way,
    Work,
    plan_items,
    plan_work,
)
from sharding.kernels.triton_weights import PlanesWeight, pack
from sharding.model.sampling import draw, score

if TYPE_CHECKING:
    from sharding.batch import Choice, SamplingParams
    from sharding.gguf.reader import GGUFFile
    from sharding.kernels import Layers, Weight
    from sharding.kernels.block_weights import BlockWeights, ExpertWeights, HeadWeights
    from sharding.model.arch import Activation
    from sharding.model.attention import BatchIndex
    from sharding.model.kv_cache import LayerPages
    from sharding.model.sampling import History

log = logging.getLogger("longspan.kernels")

LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with the asynchronous copies and matrix instructions that Triton emits here."""


_MISFITS = ("no NVIDIA driver", "driver on your system is too old", "No CUDA GPUs", "not compiled")
"""What torch says where there is no GPU that it could use; all else that it says passes or may: a
GPU that is busy, full or broken."""

_CANNOT_START = (RuntimeError, OSError, AssertionError, SubprocessError, TritonError)
"""What starting a kernel raises: torch, a missing compiler, header or driver library, Triton."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def choose_device() -> torch.device:
    """The first GPU, or the CPU under the interpreter. Raises `ConfigError` that says what is
    missing, `StageError` if a GPU is there but fails: another process may hold it."""
    if interpreted():
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ConfigError(
            f"--kernels triton needs a GPU, and torch {torch.__version__} was built without CUDA"
        )
    try:
        torch.cuda.init()
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        if any(words in str(error) for words in _MISFITS):
            raise ConfigError(f"--kernels triton needs a GPU: {error}") from error
        raise failing_gpu(error) from error
    if capability < LEAST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        raise ConfigError(
            f"--kernels triton needs compute capability {LEAST_CAPABILITY[0]}.0 or higher; {name} "
            f"has {major}.{minor}"
        )
    return torch.device("cuda", torch.cuda.current_device())


def failing_gpu(error: Exception) -> StageError:
    """Of a GPU that is there and does not compute now; without CUDA's advice to its programmers."""
    said = str(error).split("\n")[0]
    return StageError(
        f"the GPU fails: {said}; if another process holds it (see nvidia-smi), or its compute mode "
        "allows but one, use no more --stages than GPUs, or --kernels cpu"
    )


class TritonKernels:
    """See the contract in `sharding/kernels/__init__.py`."""

    name = "triton"
    # A batch of a new shape may need a kernel that does not compile.
    failures = (*COMPUTING_FAILED, OSError, SubprocessError, TritonError)

    def __init__(self) -> None:
        self.device = choose_device()
        slow = interpreted()
        self.products = triton_products.Products(
            self.device, triton_products.INTERPRETED if slow else triton_products.Tiles()
        )
        self.tiles = INTERPRETED if slow else _tiles(self.device)
        self._try()
        # The batch at work and how its attention is cut: layers ask for the same one by one.
        self._index: BatchIndex | None = None
        self._works: dict[Way, Work] = {}

    def _try(self) -> None:
        """Triton builds its launcher with the machine's C compiler when the first kernel starts:
        that had better be now. Raises `ConfigError` with what is missing, `StageError` if the GPU
        fails."""
        try:
            self._launch()
        except _CANNOT_START as error:
            if _is_of_cuda(error):
                raise failing_gpu(error) from error
            raise ConfigError(
                f"--kernels triton: no kernel runs here: {type(error).__name__}: {error}"
            ) from error

    def _launch(self) -> None:
        """A kernel, from its start to its result."""
        row_TI = torch.ones(1, 32, device=self.device)
        float(self.rms_norm(row_TI, row_TI[0], 0.0).sum())

    def works(self) -> bool:
        """After a failure CUDA refuses all further work of the process."""
        try:
            self._launch()
        except _CANNOT_START as error:
            log.warning("no kernel runs any more: %s", error)
            return "out of memory" in str(error)  # full is not broken
        return True

    def pack(self, file: GGUFFile, names: Sequence[str]) -> Weight:
        """Split into planes on the device."""
        infos = [file.tensors[name] for name in names]
        for info in infos:
            if info.format.name not in PLANES:
                raise UnsupportedModelError(
                    f"tensor {info.name} has quantisation {info.format.name}, which is not computed"
                )
        return pack(file, infos, self.device)

    def pack_experts(self, file: GGUFFile, names: Sequence[str]) -> Sequence[Weight]:
        """There are no kernels for them yet."""
        raise UnsupportedModelError(NO_MIXTURES)

    def embed(
        self, weight: Weight, ids: Sequence[int], out_TI: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows expanded by their ids."""
        if ids and not 0 <= min(ids) <= max(ids) < weight.rows:
            raise IndexError(f"a row outside [0, {weight.rows})")
        ids_T = torch.tensor(ids, dtype=torch.int64).to(self.device)
        return self.products.rows(_own(weight), ids_T)

    def matmul(
        self, x_TI: torch.Tensor, weight: Weight, residual_TO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """By the number of tokens: see `triton_products.py`."""
        assert x_TI.is_contiguous() and x_TI.shape[1] == weight.cols, x_TI.shape
        if residual_TO is not None:
            assert residual_TO.is_contiguous(), residual_TO.stride()
            assert residual_TO.shape == (len(x_TI), weight.rows), residual_TO.shape
        return self.products.matmul(x_TI, _own(weight), residual_TO)

    def rms_norm(
        self,
        x_TI: torch.Tensor,
        scale_I: torch.Tensor,
        eps: float,
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A row a program."""
        if residual_TI is not None:
            assert residual_TI.is_contiguous() and residual_TI.shape == x_TI.shape
        return triton_rows.rms_norm(x_TI.contiguous(), scale_I, eps, residual_TI)

    def rotate_and_store(
        self,
        qkv_TX: torch.Tensor,
        index: BatchIndex,
        pages: LayerPages,
        heads: HeadWeights = PLAIN_HEADS,
    ) -> torch.Tensor:
        """Pages are written in place."""
        return triton_rows.rotate_and_store(qkv_TX, index, pages, heads)

    def attention(
        self, q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int = 0
    ) -> torch.Tensor:
        """Few rows of a request finely, chunks in FP16: see `triton_attention.py`."""
        work = self.work(q_TX, index, pages, window)
        return triton_attention.attend(q_TX, index, pages, window, work, self.tiles)

    def work(self, q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int) -> Work:
        """How that attention is cut: as `use` said, or as the batch's other layers."""
        if self._index is None or not index.is_of(self._index):
            self._index, self._works = index, {}
        dim, kv_heads = pages.head_dim, pages.kv_heads
        assert dim <= triton_attention.MOST_DIMS, dim  # `layers` says so to the user
        way = Way(q_TX.shape[1] // dim // kv_heads, kv_heads, window, dim)
        if way not in self._works:
            self._works[way] = plan_work(index, way, self.tiles)
        return self._works[way]

    def gated(self, gate_up_T2F: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """The first half of the columns is the gate."""
        return triton_rows.gated(gate_up_T2F, activation)

    def mix_experts(
        self,
        x_TI: torch.Tensor,
        experts: ExpertWeights,
        activation: Activation = "silu",
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """There are none: `pack_experts` refuses them."""
        raise UnsupportedModelError(NO_MIXTURES)

    def draw(
        self,
        logits_V: torch.Tensor,
        params: SamplingParams,
        position: int,
        drawn: int,
        history: History | None,
    ) -> int:
        """Among all tokens block by block, then among the blocks' best; filters are torch's."""
        return draw(logits_V, params, position, drawn, history, triton_rows.gumbel_argmax)

    def score(
        self, logits_TV: torch.Tensor, targets: Sequence[int], alternatives: int
    ) -> list[Choice]:
        """Torch, slab by slab."""
        return score(logits_TV, targets, alternatives)

    def layers(self, weights: Sequence[BlockWeights], pages: Sequence[LayerPages]) -> Layers:
        """Pairs of steps fused, on a GPU as graphs too. Raises `UnsupportedModelError` for heads
        beyond the kernels' range."""
        for layer in pages:
            if layer.head_dim > triton_attention.MOST_DIMS:
                raise UnsupportedModelError(
                    f"attention heads of {layer.head_dim} numbers; the Triton kernels take up to "
                    f"{triton_attention.MOST_DIMS}"
                )
        fused = FusedLayers(self, weights, pages)
        return fused if self.device.type != "cuda" else GraphedLayers(self, fused)

    def head(self, norm_I: torch.Tensor, eps: float, weight: Weight) -> ComposedHead:
        """Kernel by kernel."""
        return ComposedHead(self, norm_I, eps, weight)

    def cuts(self, index: BatchIndex, ways: Sequence[Way]) -> list[Items]:
        """How attention is cut, for each way of blocks."""
        return [plan_items(index, way, self.tiles) for way in ways]

    def use(self, index: BatchIndex, works: dict[Way, Work]) -> None:
        """Attention of that batch is cut so."""
        self._index, self._works = index, works


def _is_of_cuda(error: Exception) -> bool:
    """Whether a GPU said so, rather than what is needed to compile and load a kernel for it."""
    if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
        return True
    said = str(error)
    return (
        said.startswith("Triton Error [CUDA]")
        and "kernel image" not in said
        and ("PTX" not in said)
    )


def _tiles(device: torch.device) -> Tiles:
    """By the shared memory of a program."""
    # In torch, but not in its types.
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return HOPPER if most >= 227 << 10 else Tiles()


def _own(weight: Weight) -> PlanesWeight:
    assert isinstance(weight, PlanesWeight), "a weight of another kernel set"
    return weight
