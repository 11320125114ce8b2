"""SmolLM2 behind HTTP for the tests that need Ray: started once, used by all."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.access import KEY_VARIABLE
from serving.cluster import Deployment, deployed
from serving.config import ServeConfig
from tests.stages import wait_until

CONTEXT = 1024
_READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Served:
    """A running server: `url` without `/v1`, and the deployment behind it."""

    url: str
    model: str
    deployment: Deployment


@contextlib.contextmanager
def serve_model(path: Path, stages: int = 2) -> Iterator[Served]:
    """Deploy over Ray and wait until it serves.

    The cluster believes in two GPUs: tests of stages on GPUs join it.
    """
    os.environ["RAY_OVERRIDE_RESOURCES"] = '{"GPU": 2}'
    os.environ.pop(KEY_VARIABLE, None)  # of whoever runs the tests
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = ServeConfig(
        model=str(path),
        model_name="smollm2",
        stages=stages,
        context=CONTEXT,
        kv_tokens=24 * CONTEXT,
        port=port,
        kernels="cpu",  # "auto" would believe in the GPU too, where torch was built for one
    )
    with deployed(config) as deployment:
        wait_until(lambda: deployment.status().state == "ready", _READY_TIMEOUT_S)
        yield Served(f"http://127.0.0.1:{port}", "smollm2", deployment)
