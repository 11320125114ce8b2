"""What tests share: real models, one Ray cluster and one served model for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from serving.fetch import fetch
from sharding.gguf.reader import GGUFFile
from sharding.kernels import use_threads

if TYPE_CHECKING:
    from tests.served import Served


# Triton reads this when kernels are imported, in this process and in Ray's: tests of them run
# everywhere, on a GPU where there is one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share cores with Ray's processes; results must not need threads."""
    use_threads(1, "cpu")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, downloaded once into the user's cache."""
    return fetch("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M Q4_K_M, downloaded once into the user's cache."""
    return fetch("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[GGUFFile]:
    """The opened file."""
    with GGUFFile.open(smollm2_path) as file:
        yield file


@pytest.fixture(scope="session")
def served(smollm2_path: Path) -> Iterator[Served]:
    """SmolLM2 over HTTP from two Ray stages: one cluster for all tests that need one."""
    from tests.served import serve_model

    with serve_model(smollm2_path) as running:
        yield running
