"""The OpenAI-compatible HTTP application, without Ray: `create_app` makes it of a `Service`.

Routes, the limit on bodies, and what `/openapi.json` says. Not here: what a generation answers
(`chat.py`, `completions.py`), how errors look (`errors.py`) and who runs the application
(`app.py`). Nothing here outlives a request.
"""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import tokens
from serving.access import Access
from serving.answers import Wording, collect, stream
from serving.chat import ChatWording, prepare_chat
from serving.completions import prepare_completion
from serving.errors import ErrorBody, install, plain_response
from serving.gate import OPEN_PATHS, CrossOrigin, KeyCheck
from serving.metrics import render
from serving.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from serving.openai_answers import (
    ChatCompletion,
    Completion,
    DetokenizeAnswer,
    Health,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizerInfo,
    Version,
)
from serving.prepare import Job, check_model
from serving.service import Service
from serving.sse import EventStream, unless_gone
from serving.template import ChatTemplate

_RETRY_AFTER_S = 2
_ALIVE = frozenset({"loading", "ready"})
_CLIENT_LEFT = 499  # nobody reads it; the number that servers log for this

Responses = dict[int | str, dict[str, Any]]


def create_app(
    service: Service, access: Access | None = None, *, keep_alive_s: float = 10.0
) -> Application:
    """The application for one model. `access`: who may call, None: everybody. `keep_alive_s`: the
    longest silence of a stream."""
    app = Application(access or Access(), "Longspan", _version())
    app.add_middleware(_BodyLimit, most_bytes=service.model.max_body_bytes)
    app.add_middleware(_HeadAsGet)
    app.add_middleware(KeyCheck, access=lambda: app.access)
    install(app)
    _add_generation(app, service, keep_alive_s)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_health(app, service)
    _add_metrics(app, service)
    return app


class Application(FastAPI):
    """Bodies that break the schema are answered with 400 here, not with FastAPI's 422. `access` may
    be replaced while serving."""

    def __init__(self, access: Access, title: str, version: str) -> None:
        self.access = access
        super().__init__(
            title=title,
            version=version,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            strict_content_type=False,
        )

    def build_middleware_stack(self) -> ASGIApp:
        """Around everything what lets browsers read an answer, also that of a failure."""
        stack = super().build_middleware_stack()
        return CrossOrigin(stack, self.access.origins) if self.access.origins else stack

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, without FastAPI's own errors, with the keys if there are any."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        if self.access.closed:
            _describe_keys(schema)
        return schema


def _describe_keys(schema: dict[str, Any]) -> None:
    """What needs a key, and the answer without one."""
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    refusal = {
        "description": "No key, or none of this server's.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
        "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
    }
    for path in schema["paths"].keys() - OPEN_PATHS:
        for operation in schema["paths"][path].values():
            operation["security"] = [{"bearer": []}, {"header": []}]
            operation["responses"]["401"] = refusal


_ERRORS = {
    400: "The request cannot be served as asked; `param` names the field at fault.",
    404: "No such model is served.",
    413: "The body is larger than the server accepts.",
    429: "Too many requests wait; try again later.",
    500: "The server failed.",
    503: "Loading or repairing; try again later.",
}
_RETRY_HEADER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}


def _errors(*statuses: int) -> Responses:
    """What an operation's documentation says about these statuses."""
    documented: Responses = {
        status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses
    }
    for status in {429, 503} & documented.keys():
        documented[status]["headers"] = _RETRY_HEADER
    return documented


def _streamed(chunk: str) -> Responses:
    # No type: some readers of OpenAPI 3.1 take it for the whole stream's, some for each event's.
    schema = {
        "description": f"With stream: events whose data are {chunk} objects, then [DONE]. An event"
        " with an error and no [DONE] after it means that the answer is incomplete.",
    }
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}


def _add_generation(app: FastAPI, service: Service, keep_alive_s: float) -> None:
    template = ChatTemplate(service.tokenizer)
    failures = _errors(400, 404, 413, 429, 500, 503)

    async def answer(job: Job, wording: Wording, streaming: bool, request: Request) -> Response:
        if streaming:
            return EventStream(stream(service, job, wording), keep_alive_s)
        whole = await unless_gone(request.receive, collect(service, job, wording))
        return Response(status_code=_CLIENT_LEFT) if whole is None else _json(whole)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=failures | _streamed("chat.completion.chunk"),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        job = await asyncio.to_thread(prepare_chat, body, service, template)
        wording = ChatWording(job, service.tokenizer)
        return await answer(job, wording, bool(body.stream), request)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=failures | _streamed("text_completion"),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        job, wording = await asyncio.to_thread(prepare_completion, body, service)
        return await answer(job, wording, bool(body.stream), request)


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> ModelCard:
        model = service.model
        return ModelCard(id=model.name, created=model.created, max_model_len=model.context)

    @app.get("/v1/models", responses=_errors(500))
    async def models() -> ModelList:
        """What is served."""
        return ModelList(data=[card()])

    @app.get("/v1/models/{name:path}", responses=_errors(404, 500))
    async def model(name: str) -> ModelCard:
        """One served model."""
        check_model(name, service.model)
        return card()

    @app.get("/version", responses=_errors(500))
    async def version() -> Version:
        """The program's version."""
        return Version(version=_version())


def _add_tokens(app: FastAPI, service: Service) -> None:
    failures = _errors(400, 404, 413, 500)

    @app.post("/tokenize", responses=failures)
    async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
        """The tokens of a text."""
        return await asyncio.to_thread(tokens.tokenize, body, service)

    @app.post("/detokenize", responses=failures)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        """The text of tokens."""
        return await asyncio.to_thread(tokens.detokenize, body, service)

    @app.get("/tokenizer_info", responses=_errors(500))
    async def tokenizer_info() -> TokenizerInfo:
        """What the tokenizer adds and knows."""
        return tokens.tokenizer_info(service)


def _add_health(app: FastAPI, service: Service) -> None:
    unhealthy: Responses = {
        503: {"model": Health, "description": _ERRORS[503], "headers": _RETRY_HEADER}
    }

    async def health(healthy: frozenset[str]) -> Response:
        status = await service.engine.status()
        body = Health.model_validate(
            {"status": status.state, "progress": status.progress, "detail": status.detail}
        )
        if status.state in healthy:
            return _json(body)
        return _json(body, 503, {"Retry-After": str(_RETRY_AFTER_S)})

    @app.get("/health", response_model=Health, responses=_errors(500) | unhealthy)
    async def alive() -> Response:
        """Whether the server lives: also while it loads, not while it repairs."""
        return await health(_ALIVE)

    @app.get("/health/ready", response_model=Health, responses=_errors(500) | unhealthy)
    async def ready() -> Response:
        """Whether the server answers requests now."""
        return await health(frozenset({"ready"}))


def _add_metrics(app: FastAPI, service: Service) -> None:
    formats = ("text/plain", "application/openmetrics-text")  # as the scraper prefers
    text: Responses = {200: {"content": {name: {"schema": {"type": "string"}} for name in formats}}}

    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(500) | text)
    async def metrics(request: Request) -> Response:
        """The engine's books, for Prometheus."""
        status, stats = await asyncio.gather(service.engine.status(), service.engine.stats())
        accept = request.headers.get("accept", "")
        page, content_type = await asyncio.to_thread(render, service.model, status, stats, accept)
        return Response(page, headers={"Content-Type": content_type})


class _HeadAsGet:
    """HEAD is answered wherever GET is, without the body: health checks ask that way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_bare(part: Message) -> None:
            await send({**part, "body": b""} if part["type"] == "http.response.body" else part)

        await self._app({**scope, "method": "GET"}, receive, send_bare)


class _BodyLimit:
    """Refuses bodies of more than `most_bytes`, whether or not they announce their length."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body exceeds {self._most_bytes} bytes; send less"
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > self._most_bytes:
            await plain_response(413, message, "request_too_large")(scope, receive, send)
            return
        read_bytes = 0

        async def counted() -> Message:
            nonlocal read_bytes
            part = await receive()
            read_bytes += len(part.get("body", b""))
            if read_bytes > self._most_bytes:
                raise HTTPException(413, message)
            return part

        await self._app(scope, counted, send)


def _json(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = body.model_dump_json().encode()
    return Response(content, status, headers=headers, media_type="application/json")


def _version() -> str:
    try:
        return metadata.version("longspan")
    except metadata.PackageNotFoundError:  # run from its sources, not installed
        return "0+unknown"
