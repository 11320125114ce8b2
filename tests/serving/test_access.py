"""API keys and CORS: who is let in, who is not, and what the others hear."""

from __future__ import annotations

import asyncio
from io import StringIO
from pathlib import Path

import openai
import pytest
from rich.console import Console

from serving.access import KEY_VARIABLE, Access, read_access
from serving.config import ServeConfig
from serving.launch import warn_if_open
from sharding.errors import ConfigError
from tests.serving.fakes import MODEL, World, error_of

KEYS = read_access(None, (), {KEY_VARIABLE: "first-key, second-key"})
PAGE = "https://chat.example.org"
PATHS = [
    "/v1/models",
    "/v1/models/tiny",
    "/version",
    "/tokenizer_info",
    "/openapi.json",
    "/nowhere",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer first-key second-key"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic first-key"},
        {"X-Api-Key": "first-ke"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "first-key, second-key"},
        {"Authorization": "Bearer none", "X-Api-Key": "neither"},
    ],
)
def test_nothing_is_answered_without_a_key(path: str, headers: dict[str, str]) -> None:
    answer = World(access=KEYS).request("GET", path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "first-key" not in error["message"]


def test_a_stranger_reaches_no_engine() -> None:
    world = World(access=KEYS)
    assert world.chat().status_code == world.complete().status_code == 401
    assert world.engine.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer  second-key"},
        {"X-Api-Key": "second-key"},
    ],
)
@pytest.mark.parametrize("path", PATHS[:-1])
def test_either_key_in_either_header_opens_all(path: str, headers: dict[str, str]) -> None:
    assert World(access=KEYS).request("GET", path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_needs_no_key(path: str, method: str) -> None:
    assert World(access=KEYS).request(method, path).status_code == 200


@pytest.mark.parametrize("path", ["/health/", "//health", "/health/../v1/models", "/healthy"])
def test_what_only_looks_like_health_needs_one(path: str) -> None:
    assert World(access=KEYS).request("GET", path).status_code == 401


def test_without_keys_all_are_welcome() -> None:
    assert World(access=Access()).get("/v1/models").status_code == 200


@pytest.mark.parametrize(("key", "welcome"), [("first-key", True), ("another", False)])
def test_the_openai_client_with_its_key(key: str, welcome: bool) -> None:
    heard: list[str] = []

    async def play(client: openai.AsyncOpenAI) -> None:
        try:
            await client.with_options(api_key=key).chat.completions.create(
                model=MODEL.name, messages=[{"role": "user", "content": "hi"}]
            )
            heard.append("answer")
        except openai.AuthenticationError as error:
            heard.append(str(error.code))

    asyncio.run(World(access=KEYS).with_openai(play))
    assert heard == (["answer"] if welcome else ["invalid_api_key"])


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nalpha\n\n  beta  \n")
    access = read_access(str(file), (), {KEY_VARIABLE: "gamma"})
    assert [access.allows(key) for key in ("alpha", "beta", "gamma")] == [True] * 3
    assert not any(map(access.allows, ("", "# of the team", "alpha\n", "delta", "é")))
    assert b"alpha" not in repr(access).encode()


def test_a_key_that_is_taken_out_of_the_file_opens_nothing_any_more(tmp_path: Path) -> None:
    """While the server runs; those of the environment stay."""
    file = tmp_path / "keys"
    file.write_text("old\nkept\n")
    access = read_access(str(file), (PAGE,), {KEY_VARIABLE: "gamma"})
    world = World(access=access)

    def opens(key: str) -> bool:
        answer = world.request("GET", "/v1/models", headers={"X-Api-Key": key})
        return answer.status_code == 200

    assert [opens(key) for key in ("old", "kept", "gamma", "new")] == [True, True, True, False]
    file.write_text("kept\nnew\n")
    world.app.access = access.with_file(str(file))
    assert [opens(key) for key in ("old", "kept", "gamma", "new")] == [False, True, True, True]
    file.write_text("# all gone\n")
    with pytest.raises(ConfigError, match="has no API key"):
        access.with_file(str(file))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "has no API key"),
        (b"# nothing yet\n\n", "has no API key"),
        (b"two words\n", "API key 1 .* has blanks"),
        (b"fine\ncl\xc3\xa9\n", "API key 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_server_that_was_meant_to_be_closed_does_not_start_open(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        read_access(str(file), (), {})
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize("value", ["", " ", ",", "a,,b"])
def test_a_variable_with_a_gap_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        read_access(None, (), {KEY_VARIABLE: value})


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("127.0.0.1", False, False),
        ("localhost", False, False),
        ("::1", False, False),
        ("0.0.0.0", False, True),
        ("0.0.0.0", True, False),
        ("server.example.org", False, True),
    ],
)
def test_a_server_that_is_open_to_the_network_says_so(
    host: str, keys: bool, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "keys"
    file.write_text("alpha")
    said = StringIO()
    config = ServeConfig(model="x", host=host, api_key_file=str(file) if keys else None)
    warn_if_open(config, Console(file=said, width=200))
    assert ("has no API keys" in said.getvalue()) == warned


def preflight(world: World, origin: str) -> tuple[int, str | None]:
    """What a browser asks before a script's POST: status, and the origin that may go on."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = world.request("OPTIONS", "/v1/chat/completions", headers=headers)
    if answer.status_code >= 400:
        error_of(answer)
    return answer.status_code, answer.headers.get("Access-Control-Allow-Origin")


def test_scripts_of_listed_origins_may_call_and_others_may_not() -> None:
    world = World(access=Access(KEYS.key_digests, (PAGE,)))
    assert preflight(world, PAGE) == (200, PAGE)
    assert preflight(world, "https://elsewhere.example.org") == (400, None)


def test_any_origin_may_call_where_all_are_listed() -> None:
    assert preflight(World(access=Access(origins=("*",))), PAGE) == (200, "*")


def test_without_origins_nothing_is_said_of_them() -> None:
    answer = World().request("GET", "/v1/models", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert preflight(World(), PAGE) == (405, None)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {"X-Api-Key": "first-key"}, 200),
        ("/v1/models", {}, 401),
        ("/nowhere", {"X-Api-Key": "first-key"}, 404),
    ],
)
def test_a_page_may_read_every_answer_also_a_refusal(
    path: str, headers: dict[str, str], status: int
) -> None:
    world = World(access=Access(KEYS.key_digests, (PAGE,)))
    answer = world.request("GET", path, headers={"Origin": PAGE, **headers})
    assert answer.status_code == status
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]


def test_a_page_may_read_that_the_server_failed() -> None:
    world = World(lambda request: [RuntimeError("a bug")], access=Access(origins=(PAGE,)))
    body = b'{"prompt": "x"}'
    answer = world.request("POST", "/v1/completions", body, headers={"Origin": PAGE})
    assert answer.status_code == 500
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE


def test_the_description_names_what_needs_a_key() -> None:
    key = {"X-Api-Key": "first-key"}
    schema = World(access=KEYS).request("GET", "/openapi.json", headers=key).json()
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "header"}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            closed = not path.startswith("/health")
            assert ("401" in operation["responses"]) == ("security" in operation) == closed, path
    assert "securitySchemes" not in World().get("/openapi.json").json()["components"]
