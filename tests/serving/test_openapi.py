"""`/openapi.json` is true: schemathesis finds no answer that it does not describe."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.fakes import World

WORLD = World()
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", WORLD.app)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def _check(case: Case) -> None:
    case.call_and_validate(checks=CHECKS)


test_no_answer_contradicts_the_description = SCHEMA.parametrize()(
    settings(max_examples=40, deadline=None, derandomize=True, database=None)(_check)
)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_a_stream_is_as_described(path: str, asked: dict[str, object]) -> None:
    """Whatever is drawn at random above."""
    body = {"model": WORLD.service.model.name, "max_tokens": 2, "stream": True, **asked}
    case = SCHEMA[path]["POST"].Case(body=body, media_type="application/json")
    answer = case.call_and_validate(checks=CHECKS[:-1])
    assert answer.status_code == 200
    assert "[DONE]" in answer.text


OPERATIONS = [
    (path, method, operation)
    for path, operations in WORLD.app.openapi()["paths"].items()
    for method, operation in operations.items()
]


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_fastapis_own_422_is_not_promised(
    path: str, method: str, operation: dict[str, dict[str, object]]
) -> None:
    """It is answered as 400 in OpenAI's shape."""
    assert "422" not in operation["responses"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_generation_documents_streams_and_errors(path: str) -> None:
    responses = WORLD.app.openapi()["paths"][path]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(responses) == {"200", "400", "404", "413", "429", "500", "503"}
    error = {"$ref": "#/components/schemas/ErrorBody"}
    assert responses["429"]["content"]["application/json"]["schema"] == error
    assert "Retry-After" in responses["503"]["headers"]
