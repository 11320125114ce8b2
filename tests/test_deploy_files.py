"""serve.yaml, cluster.yaml, Makefile and .ci/run: read as Ray, bash and make read them, with no
cluster and no network."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import PydanticDeprecatedSince20
from ray.autoscaler._private.util import prepare_config, validate_config

from serving.cluster import RAY_SETTINGS
from serving.config import ServeConfig, load_config

with warnings.catch_warnings():
    # Ray 2.60 itself declares fields in a way that pydantic deprecates.
    warnings.simplefilter("ignore", PydanticDeprecatedSince20)
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

ROOT = Path(__file__).resolve().parents[1]

SERVE_ONLY = {"host", "port", "address"}
"""Options of `longspan serve` that Ray Serve and the cluster decide under `serve deploy`."""


def _read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture
def serve() -> dict[str, Any]:
    return _read("serve.yaml")


@pytest.fixture
def application(serve: dict[str, Any]) -> dict[str, Any]:
    (only,) = serve["applications"]
    assert isinstance(only, dict)
    return only


@pytest.fixture
def cluster() -> dict[str, Any]:
    return _read("cluster.yaml")


def test_ray_serve_accepts_the_deployment(serve: dict[str, Any]) -> None:
    deployment = ServeDeploySchema.model_validate(serve)
    assert [app.import_path for app in deployment.applications] == ["serving.app:build"]


def test_ray_serve_knows_every_key(serve: dict[str, Any], application: dict[str, Any]) -> None:
    """Ray Serve drops keys that it does not know, so a misspelt one would do nothing."""
    assert set(serve) <= set(ServeDeploySchema.model_fields)
    assert set(serve["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    assert set(application) <= set(ServeApplicationSchema.model_fields)


def test_serve_never_cuts_an_answer_by_the_clock(serve: dict[str, Any]) -> None:
    """`request_timeout_s` is end to end: it would cut the stream of a long context."""
    assert ServeDeploySchema.model_validate(serve).http_options.request_timeout_s is None


def test_the_arguments_are_all_options_at_their_defaults(application: dict[str, Any]) -> None:
    """Guards serve.yaml against an option or a default that changed in ServeConfig alone."""
    config = load_config(application["args"])
    assert set(application["args"]) == set(ServeConfig.model_fields) - SERVE_ONLY
    assert config == ServeConfig(model=config.model)


def test_ray_up_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    # `ray up` counts: fewer would leave machines out, more would wait for ever.
    workers = len(cluster["provider"]["worker_ips"])
    (node,) = prepared["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"], prepared["max_workers"]) == (workers,) * 3


def test_the_cluster_names_nobody_s_machines(cluster: dict[str, Any]) -> None:
    """192.0.2.0/24 is reserved for documentation (RFC 5737): `ray up` as is reaches no one."""
    addresses = [cluster["provider"]["head_ip"], *cluster["provider"]["worker_ips"]]
    documentation = ipaddress.ip_network("192.0.2.0/24")
    assert all(ipaddress.ip_address(address) in documentation for address in addresses)


def test_the_cluster_gets_all_that_an_installation_needs(cluster: dict[str, Any]) -> None:
    """A package that is added to the project but not to `file_mounts` would be missing there;
    without setup.py the CPU kernels would."""
    mounts = {
        local: remote
        for remote, local in cluster["file_mounts"].items()
        if remote.startswith("~/longspan/")
    }
    assert all(remote == f"~/longspan/{local}" for local, remote in mounts.items())
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    files = {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "serve.yaml"}
    assert set(mounts) == packages | files


def _bash(command: str, home: Path) -> str:
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "192.0.2.10"}
    done = subprocess.run(
        ["bash", "-euc", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_starts_with_the_settings(cluster: dict[str, Any], role: str, tmp_path: Path) -> None:
    """Runs what writes and what reads the settings, with a stand-in for `ray`: YAML's folded lines
    and two rounds of quoting are easy to get wrong."""
    bin_folder = tmp_path / "longspan-venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").write_text(f'export PATH="{bin_folder}:$PATH"\n')
    ray = bin_folder / "ray"
    ray.write_text('#!/bin/sh\necho "$@"\nenv | grep -E "^(RAY|REPORTER)_"\n')
    ray.chmod(0o755)
    for command in cluster["setup_commands"]:
        if "longspan.env" in command:
            _bash(command, tmp_path)
    *_, start = cluster[f"{role}_start_ray_commands"]

    said = _bash(start, tmp_path).splitlines()

    assert said[0].startswith("start ")
    assert ("--head" in said[0]) == (role == "head")
    assert ("--address=192.0.2.10:6379" in said[0]) == (role == "worker")
    on_one_machine = {f"{name}={value}" for name, value in RAY_SETTINGS.items()}
    assert {"RAY_AUTH_MODE=token"} | on_one_machine <= set(said)
    health = {line for line in said if line.startswith("RAY_health_check_")}
    assert health == {
        "RAY_health_check_initial_delay_ms=1000",
        "RAY_health_check_period_ms=500",
        "RAY_health_check_timeout_ms=1000",
        "RAY_health_check_failure_threshold=3",
    }


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # As if typed by a user, also when it is `make test` that runs this.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_alone_lists_the_targets() -> None:
    listed = re.findall(r"^make ([\w-]+)", _make().stdout, re.MULTILINE)
    known = [
        "help",
        "demo",
        "test",
        "lint",
        "sanitize",
        "gpu-test",
        "gpu-sanitize",
        "gpu-bench",
        "setup",
        "clean",
    ]
    assert listed == known


def test_an_old_python_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    """pip's own complaint about `requires-python` comes late and names no remedy."""
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = _make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert made.returncode != 0
    assert f"needs Python 3.11 or newer, and `{old}` is not that" in made.stderr
    assert not (tmp_path / "venv").exists()


def test_the_constraints_can_be_constraints() -> None:
    """pip refuses a constraint with extras (`ray[serve]==…`), and with it everything."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []


def test_ci_can_be_executed() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
