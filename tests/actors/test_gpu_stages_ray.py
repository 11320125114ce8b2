"""Stages on GPUs through Ray, interpreted: how they are placed and named, and what they answer."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from actors.engine import Engine
from actors.placement import PlacementConfig, RayStages
from actors.request import GenerateRequest
from sharding.gguf.reader import GGUFFile
from sharding.model_plan import Wanted
from tests.served import Served
from tests.stages import GREEDY, chunked_logits, generate, load_stages
from tests.tiny_gguf import tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = list(range(3, 12))


def test_two_stages_share_a_gpu_and_draw_what_one_stage_draws(
    served: Served, tmp_path: Path
) -> None:
    """The cluster's only GPU is divided, and its memory with it."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_llama(layers=2))
    config = PlacementConfig(path, 2, Wanted(64, 64, "triton"))
    with closing(Engine(source := RayStages(config))) as engine:
        engine.start()
        engine.wait_ready()
        drawn = generate(engine, GenerateRequest("one", PROMPT, 3, GREEDY))
        first, second = source.stats()
    with GGUFFile.open(path) as file:
        alone = load_stages(file, 1, kernels="triton")
        logits_TV = chunked_logits(alone, PROMPT + drawn[:-1], len(PROMPT))
    assert drawn == logits_TV.argmax(-1).tolist()[len(PROMPT) - 1 :]
    assert first.layers == (0, 1)
    assert second.layers == (1, 2)
    assert first.device == second.device == "cpu #0"  # GPU 0, interpreted
    assert first.link == second.link == "Unix socket"
