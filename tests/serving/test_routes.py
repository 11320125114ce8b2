"""The routes beside generation: models, health, tokens, version."""

from __future__ import annotations

import pytest

from actors.stats import EngineStatus
from tests.serving.fakes import BOS, World, error_of


def test_the_served_model_is_listed_and_found() -> None:
    card = {
        "id": "tiny",
        "object": "model",
        "created": 1700000000,
        "owned_by": "longspan",
        "max_model_len": 4096,
    }
    assert World().get("/v1/models").json() == {"object": "list", "data": [card]}
    assert World().get("/v1/models/tiny").json() == card


def test_a_model_with_a_slash_in_its_name_can_be_asked_for() -> None:
    """Names such as `org/model` are common."""
    world = World()
    model = world.service.model
    world.service.model = type(model)("org/tiny", 10, 0, "fp")
    assert world.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_another_model_is_not_found() -> None:
    response = World().get("/v1/models/org/other")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("state", "alive", "ready"),
    [("loading", 200, 503), ("ready", 200, 200), ("repairing", 503, 503), ("failed", 503, 503)],
)
def test_health_tells_alive_from_ready(state: str, alive: int, ready: int) -> None:
    """A server that loads for minutes must not be restarted, nor be sent requests."""
    world = World()
    world.engine.state = EngineStatus(state, 0.25, "stage 1 reads its weights")
    for path, status in (("/health", alive), ("/health/ready", ready)):
        response = world.get(path)
        assert response.status_code == status
        assert ("Retry-After" in response.headers) == (status == 503)
        assert response.json() == {
            "status": state,
            "progress": 0.25,
            "detail": "stage 1 reads its weights",
        }


def test_the_version_is_told() -> None:
    assert World().get("/version").json()["version"]


def tokens(**body: object) -> object:
    response = World().post("/tokenize", body)
    assert response.status_code == 200
    return response.json()["tokens"]


def test_both_spellings_of_tokenize_work_with_their_defaults() -> None:
    """vLLM's `prompt` adds special tokens by default, llama.cpp's `content` does not."""
    assert tokens(prompt="hi") == [BOS, 104, 105]
    assert tokens(content="hi") == [104, 105]
    assert tokens(prompt="hi", add_special_tokens=False) == [104, 105]
    assert tokens(content="hi", add_special=True) == [BOS, 104, 105]


def test_special_tokens_in_a_text_may_be_plain_text() -> None:
    assert tokens(content="<s>") == [BOS]
    assert tokens(content="<s>", parse_special=False) == list(b"<s>")


def test_pieces_show_parts_of_characters_as_bytes() -> None:
    pieces = tokens(content="hé", with_pieces=True)
    assert pieces == [
        {"id": 104, "piece": "h"},
        {"id": 195, "piece": [195]},
        {"id": 169, "piece": [169]},
    ]


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/models", "/version"])
def test_head_is_get_without_a_body(path: str) -> None:
    """Health checks ask that way."""
    world = World()
    bare, whole = world.request("HEAD", path), world.get(path)
    assert (bare.status_code, bare.content) == (whole.status_code, b"")
    assert bare.headers["content-length"] == whole.headers["content-length"]
    assert world.request("HEAD", "/v1/completions").status_code == 405


def test_tokenize_says_how_many_and_how_many_fit() -> None:
    body = World().post("/tokenize", {"content": "hi"}).json()
    assert (body["count"], body["max_model_len"]) == (2, 4096)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "content": "b"},
        {"content": 5},
        {"content": "a", "add_special": True, "add_special_tokens": False},
    ],
)
def test_tokenize_needs_exactly_one_text(body: dict[str, object]) -> None:
    assert World().post("/tokenize", body).status_code == 400


def test_detokenize_gives_the_text_under_both_names() -> None:
    body = World().post("/detokenize", {"tokens": [BOS, *"hé".encode()]}).json()
    assert body == {"prompt": "<s>hé", "content": "<s>hé"}


@pytest.mark.parametrize("bad", [[260], [-1], ["1"], [True], "x", None])
def test_detokenize_refuses_what_is_no_token(bad: object) -> None:
    response = World().post("/detokenize", {"tokens": bad})
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("tokens")


def test_the_tokenizer_describes_itself() -> None:
    info = World(template="{{ messages }}").get("/tokenizer_info").json()
    assert info == {
        "vocab_size": 260,
        "max_model_len": 4096,
        "add_bos_token": True,
        "bos_token": "<s>",
        "bos_token_id": 256,
        "eos_token": "</s>",
        "eos_token_id": 257,
        "stop_token_ids": [257, 259],
        "chat_template": "{{ messages }}",
    }
