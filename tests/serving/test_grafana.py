"""`longspan dashboard` against a Grafana on loopback: what is sent, said and returned."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from serving import cli, grafana
from serving.alerts import alert_rules
from serving.dashboard import dashboard
from serving.grafana import TOKEN_VARIABLE
from tests.serving.fake_grafana import PROMETHEUS, TOKEN, FakeGrafana


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def fake() -> Iterator[FakeGrafana]:
    with FakeGrafana() as opened:
        yield opened


@pytest.fixture
def longspan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command with the right token in the environment. No message may quote a token."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["longspan", "dashboard", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert "glsa_" not in out + err
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, out, err)

    return run


def chosen_source(fake: FakeGrafana) -> str:
    """Uid of the data source that the saved dashboard begins with."""
    (variable, _) = fake.dashboards["longspan"]["dashboard"]["templating"]["list"]
    return str(variable["current"]["value"])


def test_a_first_run_makes_the_folder_and_the_dashboard(
    fake: FakeGrafana, longspan: Command
) -> None:
    done = longspan("--grafana", fake.url)
    assert (done.status, done.out) == (0, f"{fake.url}/d/longspan\n")
    ((uid, title),) = fake.folders.items()
    assert title == "Longspan"
    assert len(uid) <= 40
    assert fake.calls == [
        ("GET", "/api/datasources"),
        ("GET", f"/api/folders/{uid}"),
        ("GET", "/api/folders?limit=1000"),
        ("POST", "/api/folders"),
        ("POST", "/api/dashboards/db"),
    ]
    assert {each.authorization for each in fake.asked} == {f"Bearer {TOKEN}"}
    saved = fake.dashboards["longspan"]
    assert (saved["folderUid"], saved["overwrite"]) == (uid, True)
    assert saved["dashboard"] == dashboard("prom", "Prometheus")


def test_a_second_run_replaces_what_the_first_one_made(
    fake: FakeGrafana, longspan: Command
) -> None:
    first, second = longspan("--grafana", fake.url), longspan("--grafana", fake.url)
    assert (first.status, second.status) == (0, 0)
    assert first.out == second.out
    assert len(fake.folders) == len(fake.dashboards) == 1
    assert fake.dashboards["longspan"]["version"] == 2
    assert "version 2" in second.err


def test_a_folder_that_was_renamed_is_still_ours(fake: FakeGrafana, longspan: Command) -> None:
    longspan("--grafana", fake.url)
    (uid,) = fake.folders
    fake.folders[uid] = "Language models"
    assert longspan("--grafana", fake.url).status == 0
    assert fake.folders == {uid: "Language models"}


@pytest.mark.parametrize("administrator", [True, False])
def test_a_folder_that_somebody_made_is_taken_by_its_title(
    fake: FakeGrafana, longspan: Command, administrator: bool
) -> None:
    """An editor is told 403, and not 404, of a folder that does not exist."""
    fake.folders = {"other": "Others", "mine": "LLM serving"}
    fake.administrator = administrator
    done = longspan("--grafana", fake.url, "--folder", "LLM serving", "--datasource", "prom")
    assert done.status == 0
    assert fake.dashboards["longspan"]["folderUid"] == "mine"
    assert len(fake.folders) == 2


def test_each_title_has_a_folder_of_its_own(fake: FakeGrafana, longspan: Command) -> None:
    for title in ("模型", "llm", "LLM", "x" * 200):
        assert longspan("--grafana", fake.url, "--folder", title).status == 0
    assert list(fake.folders.values()) == ["模型", "llm", "LLM", "x" * 200]


def source(uid: str, **fields: object) -> dict[str, Any]:
    return PROMETHEUS | {"uid": uid, "name": uid.title()} | fields


@pytest.mark.parametrize(
    ("sources", "asked", "chosen"),
    [
        ([source("loki", type="loki", isDefault=True), source("a"), source("b")], None, "a"),
        ([source("a"), source("b", isDefault=True)], None, "b"),
        ([source("a"), source("b", isDefault=True)], "a", "a"),
    ],
    ids=["the first Prometheus", "the default one", "the one that was named"],
)
def test_the_dashboard_begins_with_a_prometheus(
    fake: FakeGrafana,
    longspan: Command,
    sources: list[dict[str, Any]],
    asked: str | None,
    chosen: str,
) -> None:
    fake.sources = sources
    named = [] if asked is None else ["--datasource", asked]
    assert longspan("--grafana", fake.url, *named).status == 0
    assert chosen_source(fake) == chosen


def test_a_data_source_that_is_not_there_is_answered_with_those_that_are(
    fake: FakeGrafana, longspan: Command
) -> None:
    fake.sources = [source("loki", type="loki"), source("mimir")]
    done = longspan("--grafana", fake.url, "--datasource", "loki")
    assert done.status == 2
    assert "no Prometheus data source with the uid loki; it has: mimir (Mimir)" in done.err
    assert not fake.folders and not fake.dashboards


def test_without_a_prometheus_it_says_what_to_add(fake: FakeGrafana, longspan: Command) -> None:
    fake.sources = [source("loki", type="loki")]
    done = longspan("--grafana", fake.url)
    assert (done.status, done.out) == (1, "")
    assert "no Prometheus data source; add one" in done.err
    assert not fake.folders


def test_an_editor_names_the_data_source_that_it_may_not_list(
    fake: FakeGrafana, longspan: Command
) -> None:
    fake.administrator = False
    refused = longspan("--grafana", fake.url)
    assert refused.status == 1
    assert "403 (You'll need additional permissions: datasources:read)" in refused.err
    assert "--datasource UID" in refused.err
    assert longspan("--grafana", fake.url, "--datasource", "prom").status == 0
    assert chosen_source(fake) == "prom"


def test_a_wrong_token_is_told_and_not_shown(
    fake: FakeGrafana, longspan: Command, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("glsa_wrong\n")
    done = longspan("--grafana", fake.url, "--token-file", file)
    assert (done.status, done.out) == (1, "")
    assert "401 (Invalid API key): the token is wrong or has expired" in done.err
    assert fake.asked[0].authorization == "Bearer glsa_wrong"
    assert len(fake.asked) == 1, "a wrong token is not tried again"


REFUSALS: list[tuple[tuple[str, str], int, Any, str]] = [
    (
        ("POST", "/dashboards/db"),
        412,
        {"message": "The dashboard has been changed by someone else", "status": "version-mismatch"},
        "412 (The dashboard has been changed by someone else): somebody changed it at the same "
        "time, or something else has its name; run the command again",
    ),
    (("POST", "/folders"), 409, {"message": "exists"}, "409 (exists): something else has its name"),
    (("POST", "/folders"), 403, {"message": "no"}, "needs the role Editor"),
    (("GET", "/folders"), 401, {"message": "expired"}, "401 (expired)"),
    (("GET", "/datasources"), 500, {"message": "Internal"}, "500 (Internal): its log says more"),
    (("POST", "/dashboards/db"), 400, {"message": "provisioned"}, "400 (provisioned)"),
    (("GET", "/datasources"), 502, "<html>Bad\nGateway</html>", "502 (<html>Bad Gateway</html>)"),
    (("GET", "/datasources"), 500, {}, "500 (no reason given)"),
]


@pytest.mark.parametrize(("call", "status", "body", "said"), REFUSALS)
def test_a_refusal_is_told_in_grafana_s_words_with_what_to_do(
    fake: FakeGrafana,
    longspan: Command,
    call: tuple[str, str],
    status: int,
    body: object,
    said: str,
) -> None:
    fake.overrides[call] = status, body
    done = longspan("--grafana", fake.url)
    assert (done.status, done.out) == (1, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1


STRANGERS: dict[str, tuple[int, Any, str]] = {
    "a page": (200, "<html>Welcome</html>", "does not speak JSON"),
    "another API": (200, {"status": "ok"}, "is no Grafana"),
    "a list of something": (200, [{"name": "x"}], "is no Grafana"),
    "nothing": (200, None, "is no Grafana"),
    # The client library stumbles over each of these.
    "a page that speaks of a message": (404, "<html>a message</html>", "is no Grafana"),
    "an error that is null": (500, None, "is no Grafana"),
}


@pytest.mark.parametrize(("status", "body", "said"), STRANGERS.values(), ids=STRANGERS.keys())
def test_what_is_no_grafana_is_recognised(
    fake: FakeGrafana, longspan: Command, status: int, body: object, said: str
) -> None:
    fake.overrides["GET", "/datasources"] = status, body
    done = longspan("--grafana", fake.url)
    assert (done.status, done.out) == (1, "")
    assert said in done.err
    assert fake.url in done.err


def test_a_grafana_under_a_path_is_asked_there(fake: FakeGrafana, longspan: Command) -> None:
    fake.prefix = "/tools/grafana"
    done = longspan("--grafana", fake.url + "/")
    assert (done.status, done.out) == (0, f"{fake.url}/d/longspan\n")
    assert all(path.startswith("/tools/grafana/api/") for _, path in fake.calls)


def test_a_redirect_is_told_and_not_followed(fake: FakeGrafana, longspan: Command) -> None:
    """It would turn a POST into a GET, and take the token along."""
    fake.overrides["GET", "/datasources"] = 301, ""
    fake.location = f"{fake.url}/api/elsewhere"
    done = longspan("--grafana", fake.url)
    assert done.status == 1
    assert "it sends elsewhere; give the address that it sends to" in done.err
    assert fake.calls == [("GET", "/api/datasources")]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_nobody_at_the_address_is_told(longspan: Command, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = longspan("--grafana", f"http://{host}:{port}")
    assert (done.status, done.out) == (1, "")
    assert f"{host}:{port} does not answer: no connection" in done.err


def test_a_server_that_says_nothing_is_not_waited_for(
    longspan: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts connections, since the kernel does, and never answers."""
    monkeypatch.setattr(grafana, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = longspan("--grafana", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert done.status == 1
    assert "does not answer: nothing came within" in done.err


WRONG_ADDRESSES = {
    "no scheme": ("127.0.0.1:3000", "is no address such as http://127.0.0.1:3000"),
    "another scheme": ("ftp://127.0.0.1", "is no address"),
    "no host": ("http://", "is no address"),
    "a port of letters": ("http://127.0.0.1:many", "is no address"),
    "a label too long": (f"http://{'a' * 64}.example", "is no address"),
    "a query": ("http://127.0.0.1/?orgId=1", "is no address"),
    "a password": ("http://me:glsa_x@127.0.0.1", "without user and password"),
}


@pytest.mark.parametrize(("url", "said"), WRONG_ADDRESSES.values(), ids=WRONG_ADDRESSES.keys())
def test_a_wrong_address_is_wrong_usage(longspan: Command, url: str, said: str) -> None:
    done = longspan("--grafana", url)
    assert (done.status, done.out) == (2, "")
    assert said in done.err


def test_a_token_file_goes_before_the_environment(
    fake: FakeGrafana,
    longspan: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "glsa_old")
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert longspan("--grafana", fake.url, "--token-file", file).status == 0


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"glsa_a glsa_b", b"glsa_a\nglsa_b\n", "glsa_é".encode(), b"glsa_\xff"]
)
def test_a_file_that_holds_no_token_is_wrong_usage(
    fake: FakeGrafana, longspan: Command, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    done = longspan("--grafana", fake.url, "--token-file", file)
    assert (done.status, fake.asked) == (2, [])
    assert str(file) in done.err


def test_a_missing_token_is_wrong_usage(
    fake: FakeGrafana, longspan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = longspan("--grafana", fake.url, "--token-file", tmp_path / "absent")
    assert absent.status == 2
    assert "absent cannot be read: No such file" in absent.err
    monkeypatch.delenv(TOKEN_VARIABLE)
    neither = longspan("--grafana", fake.url)
    assert neither.status == 2
    assert f"give --token-file, or set {TOKEN_VARIABLE}" in neither.err
    assert fake.asked == []


def test_with_json_a_saved_dashboard_is_a_record(fake: FakeGrafana, longspan: Command) -> None:
    done = longspan("--grafana", fake.url, "--json")
    assert json.loads(done.out) == {
        "url": f"{fake.url}/d/longspan",
        "uid": "longspan",
        "version": 1,
        "folder": next(iter(fake.folders)),
        "datasource": "prom",
    }


def test_without_a_grafana_the_dashboard_is_printed(longspan: Command) -> None:
    done = longspan("--json")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == dashboard()
    assert json.loads(longspan("--json", "--datasource", "abc").out) == dashboard("abc")


def test_alert_rules_are_printed_as_a_rule_file(longspan: Command) -> None:
    done = longspan("--alerts")
    assert (done.status, done.err) == (0, "")
    assert yaml.safe_load(done.out) == alert_rules()


MISUSES = [
    [],
    ["--json", "--alerts"],
    ["--grafana", "http://127.0.0.1:1", "--alerts"],
    ["--json", "--folder", "x"],
    ["--json", "--token-file", "x"],
    ["--alerts", "--datasource", "x"],
]


@pytest.mark.parametrize("arguments", MISUSES, ids=" ".join)
def test_options_that_would_be_ignored_are_refused(longspan: Command, arguments: list[str]) -> None:
    done = longspan(*arguments)
    assert (done.status, done.out) == (2, "")
    assert "--grafana" in done.err
