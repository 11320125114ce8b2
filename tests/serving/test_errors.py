"""Every failure reaches the client as OpenAI's error object, with the right status."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator

import openai
import pytest

from actors.stats import EngineStatus
from serving.errors import TABLE, error_body
from sharding import errors
from tests.serving.fakes import ScriptedEngine, World, chat_body, error_of, saying

TREE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.LongspanError)
]


@pytest.mark.parametrize("kind", TREE)
def test_every_class_of_the_error_tree_has_its_own_row(kind: type[errors.LongspanError]) -> None:
    """A new error class would silently become a 500."""
    assert kind in TABLE


def test_a_subclass_from_elsewhere_is_told_as_its_base() -> None:
    class OddlyBusyError(errors.BusyError):
        pass

    assert error_body(OddlyBusyError("full")).error.code == "server_busy"


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (errors.BusyError("64 requests wait", 7), 429, "server_busy", "7"),
        (errors.UnavailableError("loading", 3), 503, "unavailable", "3"),
        (errors.ContextLengthError("5 > 4"), 400, "context_length_exceeded", None),
        (errors.PeerLostError("stage 1 is gone"), 503, "pipeline_error", "2"),
        (errors.StageError("stage 1 failed"), 503, "pipeline_error", "2"),
        (errors.DoesNotFitError("needs 3 GiB", 5), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses_gives_a_proper_status_even_to_a_stream(
    failure: Exception, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    """A stream that began with 200 and then said "busy" would not be retried by clients."""
    response = World(lambda _: [failure]).chat(stream=stream)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert error_of(response)["message"] == str(failure)
    assert response.headers.get("Retry-After") == retry_after


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_says_nothing_of_the_inside(stream: bool) -> None:
    """Messages of foreign exceptions hold paths, addresses and other users' data."""
    response = World(lambda _: [OSError("/secret/path")]).chat(stream=stream)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["type"] == "server_error"


def test_a_crash_outside_the_engine_is_a_plain_500_too() -> None:
    class Broken(ScriptedEngine):
        async def status(self) -> EngineStatus:
            raise OSError("/secret/path")

    world = World()
    world.service.engine = Broken()
    response = world.get("/health")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"


def test_a_permanent_failure_is_not_retried_by_the_openai_client() -> None:
    """The client repeats any 500 unless told otherwise; a long prompt would run three times."""
    world = World(lambda _: [errors.ConfigError("no")])

    async def play(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="tiny", prompt="x")

    asyncio.run(world.with_openai(play))
    assert len(world.engine.requests) == 1


@pytest.mark.parametrize("content", [b"{", b'{"a": 1,}', b"\xff", b"", b"[" * 100_000])
def test_malformed_json_is_400_and_never_422(content: bytes) -> None:
    response = World().request("POST", "/v1/completions", content)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_syntax_error_says_where_it_is() -> None:
    response = World().request("POST", "/v1/completions", b'{"prompt": oops}')
    assert "character 11" in error_of(response)["message"]


def test_a_body_that_is_not_sent_as_json_is_told_so() -> None:
    """What `curl -d` sends unless a header is given."""
    form = "application/x-www-form-urlencoded"
    response = World().request("POST", "/v1/completions", b'{"prompt": "x"}', form)
    assert response.status_code == 400
    assert "JSON" in error_of(response)["message"]


def test_unknown_routes_and_methods_answer_in_the_same_shape() -> None:
    missing = World().get("/v1/nothing")
    assert missing.status_code == 404
    assert "/v1/nothing" in error_of(missing)["message"]
    refused = World().get("/v1/completions")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")
    assert error_of(refused)["code"] == "method_not_allowed"


def test_an_unknown_model_is_404_with_the_served_name() -> None:
    response = World().chat(model="gpt-9")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert "tiny" in error_of(response)["message"]


def test_a_served_model_is_found_under_its_name() -> None:
    assert World(saying("yes")).chat(model="tiny").status_code == 200


def small_world() -> World:
    """Takes bodies of up to 200 bytes."""
    world = World()
    model = type(world.service.model)("tiny", 4096, 0, "fp", max_body_bytes=200)
    return World(model=model)


def test_a_body_over_the_limit_is_413() -> None:
    response = small_world().post("/v1/chat/completions", chat_body("x" * 300))
    assert response.status_code == 413
    assert "200 bytes" in error_of(response)["message"]


def test_a_body_over_the_limit_is_413_without_an_announced_length() -> None:
    """A chunked upload has no Content-Length; unbounded, it would fill the memory."""
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 100
            yield b" " * 100

    response = small_world().request("POST", "/v1/completions", chunks())
    assert response.status_code == 413
    assert "200 bytes" in error_of(response)["message"]
    assert read < 1000, "the rest of the body must not be read"


def test_a_body_at_the_limit_is_served() -> None:
    body = b'{"prompt": "x"}'
    assert small_world().request("POST", "/v1/completions", body.ljust(200)).status_code == 200
