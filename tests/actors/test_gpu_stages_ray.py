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
from tests.tiny_gguf import tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = list(range(3, 12))


def test_three_stages_share_two_gpus_and_draw_what_one_stage_draws(
    served: Served, tmp_path: Path
) -> None:
    """Neighbours share one of the cluster's GPUs, and the other is not left idle."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(layers=3))
    config = PlacementConfig(path, 3, Wanted(64, 64, "triton"))
    with closing(Engine(source := RayStages(config))) as engine:
        engine.start()
        engine.wait_ready()
        drawn = generate(engine, GenerateRequest("one", PROMPT, 3, GREEDY))
        first, second, third = source.stats()
    with GGUFFile.open(path) as file:
        alone = load_stages(file, 1, kernels="cpu")
        logits_TV = chunked_logits(alone, PROMPT + drawn[:-1], len(PROMPT))
    assert drawn == logits_TV.argmax(-1).tolist()[len(PROMPT) - 1 :]
    assert [stage.layers for stage in (first, second, third)] == [(0, 1), (1, 2), (2, 3)]
    assert first.device == second.device
    assert {second.device, third.device} == {"cpu #0", "cpu #1"}  # GPUs 0 and 1, interpreted
    assert first.link == second.link == third.link == "Unix socket"
