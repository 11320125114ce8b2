"""`longspan serve`: deploy, show the stages load, print where they are, wait for the end."""

from __future__ import annotations

import ipaddress
import signal
import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from serving.access import KEY_VARIABLE, read_access
from serving.cluster import Deployment, check_config, deployed
from serving.config import ServeConfig
from serving.show import stage_table
from sharding.errors import UnavailableError

if TYPE_CHECKING:
    from types import FrameType

_POLL_S = 0.2


def serve_until_interrupted(config: ServeConfig, err: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises `LongspanError` when the model cannot be loaded, and
    `KeyboardInterrupt` when interrupted before it served, or again while it stops."""
    stopped = threading.Event()
    _stop_on_signal(stopped, err)
    check_config(config)
    warn_if_open(config, err)
    err.print(f"starting Ray for {config.stages} stages of {config.served_name}", markup=False)
    # Again once Ray has put handlers of its own, which print a stack trace.
    with deployed(config, on_ray=lambda: _stop_on_signal(stopped, err)) as deployment:
        if stopped.is_set():
            raise KeyboardInterrupt
        if _wait_loaded(deployment, stopped, err):
            err.print(stage_table(deployment.stats()))
            url = f"http://{config.host}:{config.port}/v1"
            err.print(f"serving {config.served_name} at {url} (Ctrl-C ends it)", markup=False)
            stopped.wait()
        else:
            raise KeyboardInterrupt


def warn_if_open(config: ServeConfig, err: Console) -> None:
    """Raises `ConfigError` for API keys that cannot be read, before Ray has started."""
    access = read_access(config.api_key_file, config.cors_origins)
    if not access.closed and not _is_loopback(config.host):
        err.print(
            f"whoever reaches {config.host}:{config.port} may use this server: it has no API keys"
            f" (--api-key-file, {KEY_VARIABLE})",
            markup=False,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _stop_on_signal(stopped: threading.Event, err: Console) -> None:
    """At once in words, in order a moment later: Ray is not stopped in the middle of its start."""

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        err.print("stopping (again to stop at once)")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _wait_loaded(deployment: Deployment, stopped: threading.Event, err: Console) -> bool:
    """Whether the engine is ready; false when interrupted before."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err) as progress:
        task = progress.add_task("loading", total=1.0)
        while not stopped.is_set():
            status = deployment.status()
            if status.state == "failed":
                raise UnavailableError(status.detail)
            progress.update(task, completed=status.progress, description=status.detail or "ready")
            if status.state == "ready":
                return True
            time.sleep(_POLL_S)
    return False
