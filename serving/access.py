"""Who may call: API keys, and the web origins whose pages may.

Keys come from a file or the environment, never from a command line, which everybody on a machine
can read. From here on only their digests exist: what Ray stores of an application tells no key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.errors import ConfigError

KEY_VARIABLE = "LONGSPAN_API_KEY"
"""Environment variable with a key, or several with commas between them."""


@dataclass(frozen=True)
class Access:
    """`key_digests`: SHA-256 of each key that opens the API, `file_digests` of those in a file;
    none: it is open to everybody. `origins`: of pages whose scripts may call, as browsers spell
    them; "*" for all."""

    key_digests: tuple[bytes, ...] = ()
    origins: tuple[str, ...] = ()
    file_digests: tuple[bytes, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether a key is needed."""
        return bool(self.key_digests or self.file_digests)

    def with_file(self, name: str) -> Access:
        """With the keys that a file has now. Raises `ConfigError`."""
        return replace(self, file_digests=tuple(map(_digest, _keys_of_file(name))))

    def allows(self, key: str) -> bool:
        """Whether a key opens the API. How long that takes does not depend on the key."""
        digest = _digest(key)
        known = (*self.key_digests, *self.file_digests)
        return sum(hmac.compare_digest(digest, each) for each in known) > 0


def read_access(
    key_file: str | None, origins: tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> Access:
    """The keys of a file, one a line, `#` begins a comment, and of `LONGSPAN_API_KEY`.

    Raises `ConfigError` for a file that cannot be read or has no key, and for a key that no header
    can carry: a server that was meant to be closed must not open by mistake.
    """
    value = environment.get(KEY_VARIABLE)
    keys = [] if value is None else _checked(value.split(","), KEY_VARIABLE)
    access = Access(tuple(map(_digest, keys)), origins)
    return access if key_file is None else access.with_file(key_file)


def _keys_of_file(name: str) -> list[str]:
    try:
        lines = Path(name).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API keys in {name} cannot be read: {error}") from error
    lines = [line.strip() for line in lines]
    return _checked([line for line in lines if line and not line.startswith("#")], name)


def _checked(keys: list[str], source: str) -> list[str]:
    """Raises `ConfigError`; no message quotes a key."""
    keys = [key.strip() for key in keys]
    if not any(keys):
        raise ConfigError(f"{source} has no API key; give one, or leave it out for an open server")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable() and key and " " not in key):
            raise ConfigError(
                f"API key {number} of {source} is empty, or has blanks or other than ASCII "
                "characters"
            )
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
