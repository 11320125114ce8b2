"""Ray and Serve from the command line: start or join a cluster, deploy the application, take all of
it down.

Not here: what is deployed (`app.py`) and what is printed about it (`cli.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cores import behind_computing
from actors.stats import EngineStats, EngineStatus
from serving.app import build, describe_model
from serving.config import ServeConfig
from sharding.errors import ConfigError, UnavailableError

_OBJECT_STORE_BYTES = 128 << 20
_CALL_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0

APPLICATION = "longspan"

RAY_SETTINGS = {
    # Ray runs workers at nice 15 otherwise.
    "RAY_worker_niceness": "0",
    # Answers go from the ingress to the proxy by gRPC, not as Ray objects: a third less of Serve's
    # processor time for each piece.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # gRPC's own limit is 4 MiB, which a long prompt's log-probabilities exceed.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1),
    # Serve looks after its replicas, and Ray's agent after its node, less often: 92 ms of processor
    # time a second when nobody asks for anything instead of 138.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "REPORTER_UPDATE_INTERVAL_MS": "10000",
}
"""Environment of a cluster that is started here; `cluster.yaml` says the same."""


class Deployment:
    """The deployed application, as whoever deployed it may ask it."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    def status(self) -> EngineStatus:
        """Whether it serves. Raises `UnavailableError` if nothing answers."""
        with _ray_errors():
            status: EngineStatus = self._engine.status.remote().result(timeout_s=_CALL_TIMEOUT_S)
            return status

    def stats(self) -> EngineStats:
        """The engine's and the stages' books."""
        with _ray_errors():
            stats: EngineStats = self._engine.stats.remote().result(timeout_s=_CALL_TIMEOUT_S)
            return stats

    def pids(self) -> tuple[int, list[int]]:
        """The engine's process, and the stages', first stage first."""
        with _ray_errors():
            pids: tuple[int, list[int]] = self._engine.pids.remote().result(
                timeout_s=_CALL_TIMEOUT_S
            )
            return pids


@contextlib.contextmanager
def deployed(
    config: ServeConfig, on_ray: Callable[[], None] = lambda: None
) -> Iterator[Deployment]:
    """Deploy for the length of a `with`; a cluster that was started here ends with it.

    `on_ray` is called as soon as Ray has started: it installs signal handlers, for one. Raises
    `ConfigError` for an address where no Ray answers.
    """
    # Its progress reports say nothing that ours do not.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    start_ray(config.address)
    on_ray()
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        _deploy(config)
        yield Deployment(serve.get_deployment_handle("engine", APPLICATION))
    finally:
        # A cluster of our own ends with all that runs on it.
        try:
            if config.address is not None:
                serve.delete(APPLICATION)
        finally:
            stop_ray()


def _deploy(config: ServeConfig) -> None:
    try:
        serve.run(build(config.model_dump()), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise UnavailableError(f"Ray Serve could not deploy: {error}") from error


def stop_ray() -> None:
    """Leave the cluster; one that was started here ends."""
    ray.shutdown()


def start_ray(address: str | None) -> None:
    """Join the cluster at `address`, or start one that lives as long as this process."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # A cluster of this process alone listens on loopback and needs no token in the user's home.
    if address is not None:
        _check_address(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with behind_computing():
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="WARNING",
            _node_ip_address="127.0.0.1",
        )


def check_config(config: ServeConfig) -> None:
    """What can be told in a second, before Ray and Serve start for ten.

    Raises `ConfigError` for a port in use, `ModelFileError` for a model that cannot be read.
    """
    if config.address is None:
        _check_port(config.host, config.port)
    describe_model(config)


def _check_port(host: str, port: int) -> None:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family):
            pass
    except OSError as error:
        # The text of `create_server` would repeat the address.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from error


def _check_address(address: str) -> None:
    """Ray itself would try for minutes to reach a host and port where nothing listens."""
    host, separator, port = address.rpartition(":")
    if not (separator and port.isdigit() and host and "/" not in host):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S):
            pass
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error


@contextlib.contextmanager
def _ray_errors() -> Iterator[None]:
    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise UnavailableError(f"the engine does not answer: {error}") from error
