"""A Grafana on loopback that knows as much of the HTTP API as the dashboard needs.

By Grafana's documentation: Bearer tokens; data sources are for administrators to list; a folder and
a dashboard live under their uids; a dashboard that is there is replaced only with `overwrite`. No
route by numeric id: Grafana has removed them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Answer = tuple[int, Any]
"""A status and a JSON body; `str` and `bytes` are sent as they are."""

TOKEN = "glsa_right"
PROMETHEUS = {"id": 1, "uid": "prom", "name": "Prometheus", "type": "prometheus"}


class Asked(NamedTuple):
    """A request that came in."""

    method: str
    path: str
    authorization: str | None
    body: Any


class FakeGrafana:
    """`overrides` answers a request of that method and path otherwise than usual; `prefix` is the
    path under which it lies. A context manager; listens between enter and exit."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.sources: list[dict[str, Any]] = [PROMETHEUS]
        self.folders: dict[str, str] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.overrides: dict[tuple[str, str], Answer] = {}
        self.location: str | None = None
        self.prefix = ""
        self.administrator = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{self.prefix}"

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Method and path of what came in."""
        return [(each.method, each.path) for each in self.asked]

    def __enter__(self) -> FakeGrafana:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, asked: Asked) -> Answer:
        """What Grafana would."""
        self.asked.append(asked)
        path = asked.path.removeprefix(f"{self.prefix}/api").partition("?")[0]
        if not asked.path.startswith(f"{self.prefix}/api/"):
            return 404, "<html>no such page; this message comes from a proxy</html>"
        if (asked.method, path) in self.overrides:
            return self.overrides[asked.method, path]
        if asked.authorization != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key"}
        routes: dict[tuple[str, str], Callable[[Any], Answer]] = {
            ("GET", "/datasources"): self._list_sources,
            ("GET", "/folders"): self._list_folders,
            ("POST", "/folders"): self._create_folder,
            ("POST", "/dashboards/db"): self._save,
        }
        if asked.method == "GET" and path.startswith("/folders/"):
            return self._folder(path.removeprefix("/folders/"))
        route = routes.get((asked.method, path))
        return route(asked.body) if route else (404, {"message": "Not found"})

    def _list_sources(self, body: object) -> Answer:
        if not self.administrator:
            return 403, {"message": "You'll need additional permissions: datasources:read"}
        return 200, self.sources

    def _list_folders(self, body: object) -> Answer:
        return 200, [
            {"id": number, "uid": uid, "title": title}
            for number, (uid, title) in enumerate(self.folders.items(), 1)
        ]

    def _folder(self, uid: str) -> Answer:
        if uid in self.folders:
            return 200, {"id": 1, "uid": uid, "title": self.folders[uid], "version": 1}
        if not self.administrator:
            return 403, {"message": "You'll need additional permissions: folders:read"}
        return 404, {"message": "folder not found", "status": "not-found"}

    def _create_folder(self, body: dict[str, str]) -> Answer:
        if body["uid"] in self.folders or body["title"] in self.folders.values():
            return 409, {"message": "a folder with the same name already exists"}
        self.folders[body["uid"]] = body["title"]
        return 200, {"id": 1, "version": 1} | body

    def _save(self, body: dict[str, Any]) -> Answer:
        model = body["dashboard"]
        known = self.dashboards.get(model["uid"])
        if known and not body.get("overwrite"):
            said = "The dashboard has been changed by someone else"
            return 412, {"message": said, "status": "version-mismatch"}
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        version = known["version"] + 1 if known else 1
        self.dashboards[model["uid"]] = {"version": version, "model": model} | body
        uid = model["uid"]
        saved = {"id": 7, "uid": uid, "url": f"/d/{uid}/longspan", "version": version}
        return 200, saved | {"status": "success", "slug": "longspan"}


def _handler(grafana: FakeGrafana) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections, as Grafana does

        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            asked = Asked(self.command, self.path, self.headers["Authorization"], body)
            status, answer = grafana.answer(asked)
            raw = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            if grafana.location:
                self.send_header("Location", grafana.location)
            self.send_header("Content-Length", str(len(raw.encode())))
            self.end_headers()
            self.wfile.write(raw.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing: pytest shows what failed."""

    return Handler
