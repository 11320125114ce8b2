"""Puts the dashboard into a Grafana: the only file that knows its client library or HTTP API.

The library (`grafana-api`) is archived, and some of its own methods use routes by numeric id that
Grafana has removed; so it carries requests here and no more, and all routes are by uid. It keeps
the token; no message of ours quotes it. Nothing is tried twice: the user can run the command again.

Source: Grafana's HTTP API, of data sources, folders and dashboards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from grafana_api.grafana_api import GrafanaException
from grafana_api.grafana_face import GrafanaFace
from requests import exceptions

from serving.dashboard import UID, dashboard
from sharding.errors import ConfigError, GrafanaError

TOKEN_VARIABLE = "LONGSPAN_GRAFANA_TOKEN"
TIMEOUT_S = 10.0
"""Of a connection, and then of each silence of the server."""

_MOST_FOLDERS = 1000
"""That Grafana lists in one answer."""

_T = TypeVar("_T")

_REMEDIES = {
    401: f"the token is wrong or has expired; give one of a service account by --token-file or "
    f"{TOKEN_VARIABLE}",
    403: "the token's service account needs the role Editor, and Admin (or --datasource UID) to "
    "find the data source",
    404: "if Grafana lies under a path, it belongs to --grafana, as in https://host/grafana",
    409: "something else has its name; choose another --folder",
    412: "somebody changed it at the same time, or something else has its name; run the command "
    "again, and if that does not help, rename or delete what is in the way",
}
"""What to do, by status of HTTP."""

_NO_ANSWER: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.TooManyRedirects, "it sends elsewhere; give the address that it sends to"),
    (exceptions.SSLError, "its certificate is not trusted; REQUESTS_CA_BUNDLE may name a file of "
     "further authorities"),
    (exceptions.ProxyError, "the proxy of the environment (HTTP_PROXY, HTTPS_PROXY) does not"),
    (exceptions.Timeout, f"nothing came within {TIMEOUT_S:g} s"),
    (exceptions.ConnectionError, "no connection; is it running, and is that its address and port?"),
    (exceptions.InvalidJSONError, "what answers does not speak JSON"),
    (exceptions.RequestException, "the exchange broke off"),
)  # fmt: skip
"""Words for what `requests` raises, the narrower class before the wider."""


class Source(msgspec.Struct, frozen=True, rename="camel"):
    """A data source of a Grafana. `type`: the id of its plugin."""

    uid: str
    name: str
    type: str = "prometheus"
    is_default: bool = False


class Published(msgspec.Struct, frozen=True):
    """A saved dashboard: its address for a browser, Grafana's count of its versions, and the uids
    of its folder and data source."""

    url: str
    uid: str
    version: int
    folder: str
    datasource: str


class _Folder(msgspec.Struct, frozen=True):
    uid: str
    title: str


class _Saved(msgspec.Struct, frozen=True):
    uid: str
    version: int


class Grafana:
    """One Grafana, of one organisation: the token's. To be closed.

    Every method raises `GrafanaError`, with what to do, if there is no answer within `TIMEOUT_S`,
    a refusal, or an answer that Grafana would not give.
    """

    def __init__(self, url: str, token: str) -> None:
        """`url`: as a browser has it, with the path under which Grafana lies, if any. Raises
        `ConfigError` for one that cannot be such an address; connects to nothing yet."""
        scheme, host, port, path = _parts(url)
        self.url = url.rstrip("/")
        self._api = GrafanaFace(
            token, host=host, port=port, url_path_prefix=path, protocol=scheme, timeout=TIMEOUT_S
        ).api
        # A redirected POST would come out as a GET, and the token go where nobody sent it.
        self._api.s.max_redirects = 0

    def prometheus_sources(self) -> list[Source]:
        """The data sources that are a Prometheus, in Grafana's order."""
        found = self._call("GET", "/datasources", list[Source])
        return [source for source in found if source.type == "prometheus"]

    def folder(self, title: str) -> str:
        """The uid of the folder with this title, which is created if it is missing.

        One of ours is found by its uid even if it was renamed or moved since; one that somebody
        else made is found by its title, at the top level only.
        """
        uid = _folder_uid(title)
        try:
            return self._call("GET", f"/folders/{uid}", _Folder).uid
        except GrafanaError as error:
            # Who may not see all folders is told 403 of one that does not exist.
            if error.status not in (403, 404):
                raise
        for folder in self._call("GET", f"/folders?limit={_MOST_FOLDERS}", list[_Folder]):
            if folder.title == title:
                return folder.uid
        return self._call("POST", "/folders", _Folder, {"uid": uid, "title": title}).uid

    def save(self, model: dict[str, Any], folder: str) -> int:
        """Create the dashboard in the folder of that uid, or replace the one that has its uid; the
        number of its version. Grafana keeps the versions before."""
        body = {
            "dashboard": model,
            "folderUid": folder,
            "overwrite": True,
            "message": "longspan dashboard",
        }
        return self._call("POST", "/dashboards/db", _Saved, body).version

    def close(self) -> None:
        """Drop its connections."""
        self._api.s.close()

    def _call(
        self, method: Literal["GET", "POST"], path: str, shape: type[_T], body: object = None
    ) -> _T:
        where = f"Grafana at {self.url}"
        try:
            return msgspec.convert(getattr(self._api, method)(path, json=body), shape)
        except GrafanaException as error:
            said = _one_line(error.response)
            remedy = _REMEDIES.get(error.status_code, "its log says more")
            refusal = f"{where} answers {method} /api{path} with {error.status_code} ({said})"
            raise GrafanaError(f"{refusal}: {remedy}", error.status_code) from error
        except exceptions.RequestException as error:
            why = next(words for kind, words in _NO_ANSWER if isinstance(error, kind))
            raise GrafanaError(f"{where} does not answer: {why}") from error
        # TypeError: the library looks for a message in an error's body, of whatever type that is.
        except (msgspec.ValidationError, TypeError) as error:
            message = f"what answers at {self.url} is no Grafana: /api{path} has another form"
            raise GrafanaError(message) from error


def publish(grafana: Grafana, datasource: str | None, folder: str) -> Published:
    """Save the dashboard in the folder of that title, reading from the data source of that uid, or
    from Grafana's default Prometheus, or else its first.

    Raises `GrafanaError`, and `ConfigError` for a data source that is not there.
    """
    source = _chosen(grafana, datasource)
    uid = grafana.folder(folder)
    version = grafana.save(dashboard(source.uid, source.name), uid)
    return Published(f"{grafana.url}/d/{UID}", UID, version, uid, source.uid)


def _chosen(grafana: Grafana, uid: str | None) -> Source:
    try:
        sources = grafana.prometheus_sources()
    except GrafanaError as error:
        if error.status == 403 and uid is not None:  # an editor may use them but not list them
            return Source(uid, uid)
        raise
    if not sources:
        raise GrafanaError(
            f"Grafana at {grafana.url} has no Prometheus data source; add one there, under "
            "Connections, that reads the Prometheus which scrapes /metrics"
        )
    if uid is None:
        return next((source for source in sources if source.is_default), sources[0])
    for source in sources:
        if source.uid == uid:
            return source
    known = ", ".join(f"{source.uid} ({source.name})" for source in sources)
    raise ConfigError(f"Grafana has no Prometheus data source with the uid {uid}; it has: {known}")


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The token in a file, or in `LONGSPAN_GRAFANA_TOKEN`; never from a command line, which
    everybody on a machine can read. Raises `ConfigError`, which does not quote it."""
    if file is None:
        where, token = TOKEN_VARIABLE, environment.get(TOKEN_VARIABLE, "")
        if not token:
            raise ConfigError(
                "Grafana wants the token of a service account: give --token-file, or set "
                f"{TOKEN_VARIABLE}"
            )
    else:
        where = str(file)
        try:
            token = file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"the token in {where} cannot be read: {reason}") from error
    token = token.strip()
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{where} does not hold one token and nothing else")
    return token


def _parts(url: str) -> tuple[str, str, int | None, str]:
    """Scheme, host, port and path (ending in a slash, or empty) as the library takes them."""
    if "@" in url:
        raise ConfigError(
            "--grafana takes an address without user and password; a token opens Grafana"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise ConfigError(f"--grafana {url} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"--grafana {url} is no address such as http://127.0.0.1:3000")
    path = parts.path.strip("/")
    return parts.scheme, f"[{host}]" if ":" in host else host, port, f"{path}/" if path else ""


def _folder_uid(title: str) -> str:
    """Stable, and within Grafana's 40 characters whatever the title is."""
    return "longspan-" + hashlib.sha256(title.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _one_line(response: object) -> str:
    """What a refusal says for people, bounded: a proxy's may be a page."""
    said = response.get("message", "") if isinstance(response, dict) else response
    return " ".join(str(said).split())[:200] or "no reason given"
