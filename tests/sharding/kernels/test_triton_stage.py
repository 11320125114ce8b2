"""A whole stage on the Triton kernels beside the CPU's: logits within what the kernels' bounds make
of them, and the same greedy tokens. On a GPU models are larger and answers longer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from sharding.batch import Segment
from sharding.errors import ConfigError, StageError
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Kernels, device_facts
from sharding.kernels import triton as triton_set
from sharding.kernels.planes import PLANES
from sharding.kernels.reference import Float32Weight, ReferenceKernels
from sharding.kernels.triton import choose_device
from sharding.kernels.triton_plan import fine_rows
from sharding.kernels.triton_products import FEW_TOKENS
from sharding.model.arch import Activation
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages
from sharding.stage import Stage
from tests.sharding.kernels import bounds, triton_bounds
from tests.sharding.kernels.bounds import U, gamma
from tests.stages import load_stages, logits, open_request
from tests.tiny_gguf import tiny_model

ON_GPU = choose_device().type == "cuda"
TWIN = "reference" if ON_GPU else "cpu"
TOKENS = 256 if ON_GPU else 2
TOLD = 3 if ON_GPU else 2
"""Tokens that tell the tolerance: disturbed, a large model is slow."""

PROMPT = 17
SMOLLM2: dict[str, object] = {
    "layers": 30,
    "hidden": 576,
    "heads": 9,
    "kv_heads": 3,
    "ffn": 1536,
    "vocab": 4096,
}
GEMMA: dict[str, object] = {
    "family": "gemma3",
    "layers": 18,
    "hidden": 768,
    "heads": 4,
    "kv_heads": 1,
    "head_dim": 256,
    "ffn": 2048,
    "vocab": 4096,
    "extra_metadata": {"gemma3.attention.sliding_window": 100},
}
TINY_GEMMA: dict[str, object] = {
    "family": "gemma3",
    "layers": 2,
    "head_dim": 32,
    "extra_metadata": {
        "gemma3.attention.sliding_window": 10,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base": 1e6,
    },
}


class DisturbedKernels(ReferenceKernels):
    """The slow twin, but every result is off by a random share of what the bounds of the Triton
    kernels allow, up or down. How far logits move then is how far theirs may."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def _shares(self, like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=self._random) * 2.0 - 1.0

    def matmul(
        self, x_TI: torch.Tensor, weight: object, residual_TO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """By the relative part of the bound of its way."""
        assert isinstance(weight, Float32Weight)
        y_TO = super().matmul(x_TI, weight, residual_TO)
        size_TO = x_TI.abs() @ weight.matrix.t().abs()
        cols = x_TI.shape[1]
        if len(x_TI) <= FEW_TOKENS:
            relative = 2.0**-21 + gamma(4 * cols)
        else:
            relative = 2 * triton_bounds.U16 + gamma(2 * cols)
        return y_TO + self._shares(y_TO) * relative * size_TO

    def attention(
        self, q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int = 0
    ) -> torch.Tensor:
        """By the bound."""
        y_TX = super().attention(q_TX, index, pages, window)
        q_THD = q_TX.unflatten(1, (-1, pages.head_dim))
        for rows in index.rows:
            part = slice(rows.first, rows.stop)
            count = q_THD[part].shape[0] * q_THD.shape[1] // pages.kv_heads
            fine = count <= fine_rows(pages.head_dim)
            _, bound = triton_bounds.attention(q_THD[part], rows, pages, window, fine, 4)
            y_TX[part] += self._shares(y_TX[part]) * bound.flatten(1).float()
        return y_TX

    def rms_norm(
        self,
        x_TI: torch.Tensor,
        scale_I: torch.Tensor,
        eps: float,
        residual_TI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """By the bound."""
        y_TI = super().rms_norm(x_TI, scale_I, eps)
        y_TI = y_TI * (1 + self._shares(y_TI) * gamma(x_TI.shape[-1] / 2 + 9))
        return y_TI if residual_TI is None else residual_TI + y_TI

    def gated(self, gate_up_T2F: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """By the bound."""
        y_TF = super().gated(gate_up_T2F, activation)
        by, off = bounds.sigmoid_of(gate_up_T2F.chunk(2, dim=-1)[0], activation)
        return y_TF * (1 + self._shares(y_TF) * (triton_bounds.exp_error(by) + off + 4 * U))


def disturbed(file: GGUFFile, seed: int) -> list[Stage]:
    """Stages on `DisturbedKernels`."""
    stages = load_stages(file, 1, kernels="reference")
    kernels: Kernels = DisturbedKernels(seed)
    for stage in stages:
        stage.kernels = kernels
        stage._layers = kernels.layers(stage._blocks, stage._pages.layers)
    return stages


def run(stages: Sequence[Stage], prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits `[T, V]` of a prompt's end and of each token of an answer that is fed one by one."""
    open_request(stages, 1, range((len(prompt) + len(answer)) // 16 + 1))
    found = [logits(stages, [Segment(1, 0, prompt)])[-1:].cpu()]
    for position, token in enumerate(answer, len(prompt)):
        found.append(logits(stages, [Segment(1, position, [token])]).cpu())
    return torch.cat(found)


def greedy(
    stages: Sequence[Stage], prompt: list[int], tokens: int
) -> tuple[list[int], torch.Tensor]:
    """An answer, and the logits that it was drawn from."""
    open_request(stages, 1, range((len(prompt) + tokens) // 16 + 1))
    found = [logits(stages, [Segment(1, 0, prompt)])[-1:].cpu()]
    answer = [int(found[0].argmax())]
    while len(answer) < tokens:
        position = len(prompt) + len(answer) - 1
        found.append(logits(stages, [Segment(1, position, answer[-1:])]).cpu())
        answer.append(int(found[-1].argmax()))
    return answer, torch.cat(found)


def cases() -> list[dict[str, object]]:
    """Tiny models of every format; on a GPU of two models' shapes as well."""
    formats = [name for name in PLANES if name != "F32"]
    tiny: list[dict[str, object]] = [
        {"quant": name, "layers": 1, "hidden": 256, "ffn": 256}
        if name.endswith("_K") or name == "IQ4_XS"
        else {"quant": name, "layers": 1}
        for name in formats
    ]
    tiny.append({"quant": "F32", "layers": 2, "tied": False, "rope_freqs": True})
    tiny.append({"family": "qwen2", "quant": "Q4_1", "layers": 1})
    tiny.append({"family": "qwen3", "quant": "Q8_0", "layers": 1, "head_dim": 32})
    tiny.append(TINY_GEMMA | {"quant": "Q5_0"})
    return [*tiny, SMOLLM2 | {"quant": "Q4_1"}, GEMMA | {"quant": "Q4_K"}] if ON_GPU else tiny


@pytest.mark.parametrize(
    "options", cases(), ids=lambda o: f"{o.get('family', 'llama')}-{o['quant']}-{o['layers']}"
)
def test_a_stage_gives_the_logits_and_the_tokens_of_the_cpu(options: dict[str, object]) -> None:
    file = GGUFFile.from_bytes(tiny_model(**options, context=512))
    vocab = load_stages(file, 1, kernels="reference")[0].shape.vocab
    prompt = torch.randint(0, vocab, (PROMPT,), generator=torch.Generator().manual_seed(4)).tolist()
    cpu = load_stages(file, 1, kernels=TWIN)
    answer, expected = greedy(cpu, prompt, TOKENS)
    found = run(load_stages(file, 1, kernels="triton"), prompt, answer[:-1])
    few = [run(disturbed(file, seed), prompt, answer[: TOLD - 1]) for seed in range(3)]
    tolerance = max(float((logits - expected[:TOLD]).abs().max()) for logits in few)
    assert tolerance < float(expected.std()) / 4  # or it would allow anything
    assert float((found - expected).abs().max()) <= tolerance
    # The same tokens, but for ties that are closer than the tolerance.
    chosen = expected.gather(1, found.argmax(-1, keepdim=True))
    assert (chosen >= expected.amax(-1, keepdim=True) - 2 * tolerance).all()
    same = sum(a == b for a, b in zip(found.argmax(-1).tolist(), answer, strict=True))
    assert same >= 0.95 * len(answer)


def test_two_stages_and_a_batch_of_three_chunks_and_tokens() -> None:
    """Hidden states travel over a stage's border, and requests of all kinds share a batch."""
    file = GGUFFile.from_bytes(tiny_model(layers=2))
    prompts = [list(range(3, 3 + count)) for count in (18, 8, 20)]
    found: dict[str, torch.Tensor] = {}
    for kernels, stages in ((TWIN, 1), ("triton", 2)):
        loaded = load_stages(file, stages, kernels=kernels)
        for number, prompt in enumerate(prompts):
            open_request(loaded, number, [number + 3 * page for page in range(4)])
            if number < 2:
                logits(loaded, [Segment(number, 0, prompt[:-1])])
        last = [Segment(n, len(p) - 1, p[-1:]) for n, p in enumerate(prompts[:2])]
        found[kernels] = logits(loaded, [*last, Segment(2, 0, prompts[2])]).cpu()
    assert (found["triton"] - found[TWIN]).abs().max() < found[TWIN].std() / 50


def test_pages_that_fall_out_of_a_window_are_used_again_unseen() -> None:
    """A window of 10 and a chunk of 4 in one page; 20 tokens want two."""
    file = GGUFFile.from_bytes(tiny_model(**TINY_GEMMA, quant="F16"))
    prompt = list(range(3, 23))
    found = []
    for ring in (None, 1):
        stages = load_stages(file, 1, kernels="triton")
        open_request(stages, 1, range(2), ring)
        for start, stop in ((0, 16), (16, 20)):
            last = logits(stages, [Segment(1, start, prompt[start:stop])])
        found.append(last.cpu())
    assert torch.equal(*found)


def forged_gpu(monkeypatch: pytest.MonkeyPatch, init: Callable[[], None], capability: int) -> None:
    """A torch that believes in a GPU."""
    monkeypatch.setattr(triton_set, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forged_gpu(monkeypatch, lambda: None, 75)
    with pytest.raises(ConfigError, match="capability 8.0 or higher; Tesla T4 has 7.5"):
        choose_device()


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    forged_gpu(monkeypatch, init, 90)
    with pytest.raises(ConfigError, match="needs a GPU: The NVIDIA driver .* is too old"):
        choose_device()


BUSY = "CUDA-capable device(s) is/are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA"


@pytest.mark.parametrize(
    ("error", "works"),
    [
        (torch.AcceleratorError(BUSY), False),
        (torch.OutOfMemoryError("CUDA out of memory"), True),  # full is not broken
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
    ],
)
def test_a_gpu_that_fails_for_now_is_told_apart_from_one_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, works: bool
) -> None:
    """Who starts stages tries again after a `StageError`, and gives up after a `ConfigError`."""

    def fail() -> None:
        raise error

    kernels = triton_set.TritonKernels()
    monkeypatch.setattr(kernels, "_launch", fail)
    with pytest.raises(StageError, match="the GPU fails: .*nvidia-smi") as told:
        kernels._try()
    assert "TORCH_USE_CUDA_DSA" not in str(told.value)
    assert kernels.works() == works
    forged_gpu(monkeypatch, fail, 90)
    with pytest.raises(StageError, match="the GPU fails"):
        choose_device()


@pytest.mark.parametrize(
    "error", [OSError("no space left"), RuntimeError("Failed to find C compiler")]
)
def test_what_is_missing_to_compile_a_kernel_is_found_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """So `--kernels auto` can still take the CPU; and a batch of a new shape that meets it later is
    lost alone."""

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(triton_set.TritonKernels, "_launch", fail)
    with pytest.raises(ConfigError, match=f"no kernel runs here: .*{error}"):
        device_facts("triton")
    assert isinstance(error, triton_set.TritonKernels.failures)


def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    """And nothing falls back: asked for Triton, a stage computes with it or not at all."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # where there is one, it is not seen
    code = "from sharding.kernels import load_kernels; load_kernels('triton')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ConfigError: --kernels triton needs a GPU" in done.stderr
