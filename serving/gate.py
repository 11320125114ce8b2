"""What stands before the HTTP application: the check of API keys, and CORS for browsers."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.access import Access
from serving.errors import plain_response

OPEN_PATHS = frozenset({"/health", "/health/ready"})
"""Answered without a key: who restarts a server or routes to it has none."""

_EXPOSED = ("Retry-After", "X-Should-Retry")


class KeyCheck:
    """Answers 401 to a request without a key that opens the API."""

    def __init__(self, app: ASGIApp, access: Callable[[], Access]) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        access = self._access()
        closed = scope["type"] == "http" and access.closed
        if not closed or _path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        keys = _given_keys(Headers(scope=scope))
        if any(map(access.allows, keys)):
            await self._app(scope, receive, send)
            return
        what = "the API key is none of this server's" if keys else "no API key was given"
        refusal = plain_response(
            401,
            f"{what}; send one as `Authorization: Bearer KEY` or `X-Api-Key: KEY`",
            "invalid_api_key",
            {"WWW-Authenticate": "Bearer"},
        )
        await refusal(scope, receive, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _given_keys(headers: Headers) -> list[str]:
    """Of either header: clients that need none still send one as a bearer."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    return [each for each in (*keys, headers.get("x-api-key")) if each is not None]


class CrossOrigin(CORSMiddleware):
    """Tells browsers that pages of the listed origins may call; answers their preflights itself,
    since those carry no key."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """A refusal looks like all others."""
        response = super().preflight_response(request_headers)
        if response.status_code < HTTPStatus.BAD_REQUEST:
            return response
        vary = response.headers.get("vary")
        said = bytes(response.body).decode()
        return plain_response(400, said, "cors_refused", {"Vary": vary} if vary else None)
