"""Errors as HTTP: every failure becomes `{"error": {"message", "type", "param", "code"}}`.

A table maps the error tree to statuses; FastAPI's and Starlette's own errors are reworded the same
way. Not here: deciding what is an error. Shapes follow OpenAI's error object, so that the `openai`
client raises its matching exception.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from sharding import errors

_log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """OpenAI's error object. `param` names the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Row(NamedTuple):
    """How one class of errors is told to clients.

    `retry_after_s` 0 sends no Retry-After; an error's own attribute of that name wins.
    """

    status: int
    type: str
    code: str | None
    retry_after_s: int = 0


_BROKEN = Row(500, "server_error", "internal_error")
_REPAIRING = Row(503, "service_unavailable_error", "pipeline_error", retry_after_s=2)

TABLE: dict[type[errors.LongspanError], Row] = {
    errors.LongspanError: _BROKEN,
    errors.ModelFileError: _BROKEN,
    errors.CorruptFileError: _BROKEN,
    errors.UnsupportedModelError: _BROKEN,
    errors.FetchError: _BROKEN,
    errors.ConfigError: _BROKEN,
    errors.DoesNotFitError: _BROKEN,
    errors.RequestError: Row(400, "invalid_request_error", "invalid_value"),
    errors.ContextLengthError: Row(400, "invalid_request_error", "context_length_exceeded"),
    errors.UnknownModelError: Row(404, "invalid_request_error", "model_not_found"),
    errors.BusyError: Row(429, "rate_limit_error", "server_busy", retry_after_s=1),
    errors.UnavailableError: Row(503, "service_unavailable_error", "unavailable", retry_after_s=2),
    errors.GrafanaError: _BROKEN,
    errors.PipelineError: _REPAIRING,
    errors.PeerLostError: _REPAIRING,
    errors.ProtocolError: _REPAIRING,
    errors.StageError: _REPAIRING,
    errors.DeviceLostError: _REPAIRING,
    errors.RepeatedLossError: Row(500, "server_error", "pipeline_error"),
}
"""Every class of the tree has its own row; a test keeps it so."""


def row_of(error: errors.LongspanError) -> Row:
    """The row of an error's class, or of its nearest base in the table."""
    return next(TABLE[base] for base in type(error).__mro__ if base in TABLE)


def error_body(error: errors.LongspanError) -> ErrorBody:
    """The body that tells a client about `error`; also sent inside a broken stream."""
    row = row_of(error)
    param = getattr(error, "param", None)
    message = _sendable(str(error))
    detail = ErrorDetail(message=message, type=row.type, param=param, code=row.code)
    return ErrorBody(error=detail)


def error_response(error: errors.LongspanError) -> Response:
    """`error` as a whole HTTP answer.

    Only what may pass by itself is worth a retry: the `openai` client would repeat any 500.
    """
    row = row_of(error)
    if row.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("answering %d: %s", row.status, error)
    wait_s = getattr(error, "retry_after_s", row.retry_after_s)
    headers = {"Retry-After": str(wait_s)} if wait_s else {"x-should-retry": "false"}
    return _json(row.status, error_body(error), headers)


def plain_response(
    status: int, message: str, code: str | None, headers: dict[str, str] | None = None
) -> Response:
    """An error that HTTP itself knows: an unknown route, a method, a body too large."""
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    detail = ErrorDetail(message=_sendable(message), type=kind, param=None, code=code)
    return _json(status, ErrorBody(error=detail), headers)


def _sendable(text: str) -> str:
    """Text that UTF-8 can carry: a client's lone surrogate may be quoted in it."""
    return text.encode("utf-8", "backslashreplace").decode()


def install(app: FastAPI) -> None:
    """Make `app` answer every failure with an error body, FastAPI's 422 included."""

    @app.exception_handler(errors.LongspanError)
    async def known(request: Request, error: errors.LongspanError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_as_request_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _http_response(request, error)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        message = "the server failed on this request; its log says why"
        return plain_response(500, message, "internal_error", {"x-should-retry": "false"})


def _http_response(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path:.200}"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.NOT_FOUND:
        return plain_response(404, f"no such route: {where}", "not_found", headers)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{where} is not allowed; allowed: {headers.get('Allow', 'nothing')}"
        return plain_response(405, message, "method_not_allowed", headers)
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return plain_response(413, str(error.detail), "request_too_large", headers)
    if error.status_code == HTTPStatus.BAD_REQUEST:
        message = f"the body cannot be read: {error.detail}; send JSON in UTF-8, not compressed"
        return plain_response(400, message, "invalid_value", headers)
    return plain_response(error.status_code, str(error.detail), None, headers)


def _as_request_error(found: Sequence[Any]) -> errors.RequestError:
    """The field at fault with what is wrong about it, from pydantic's list of errors.

    A union reports the errors of all its members; the member that got furthest into a list is the
    one that was meant.
    """
    first = max(found, key=lambda each: [part for part in each["loc"] if isinstance(part, int)])
    if first["type"] == "json_invalid":
        where = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return errors.RequestError(f"the body is not valid JSON: {where}")
    param = _path(first["loc"])
    if not param:
        return errors.RequestError(
            "the body must be a JSON object, sent with Content-Type: application/json"
        )
    reasons = dict.fromkeys(each["msg"] for each in found if _path(each["loc"]) == param)
    return errors.RequestError(f"{param}: {', or: '.join(reasons)}", param)


_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "none"})


def _path(loc: Sequence[int | str]) -> str:
    """`messages[0].content` from pydantic's location; its names for union members drop out."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _TYPE_NAMES:
            path += f".{part}" if path else part
    return path


def _json(status: int, body: BaseModel, headers: dict[str, str] | None) -> Response:
    content = body.model_dump_json().encode()
    return Response(content, status, headers=headers, media_type="application/json")
