"""What the HTTP layer needs from the rest of the program: a model's card, a tokenizer, an engine.

Protocols and values only. `serving/app.py` fills them with Ray's handles, tests with fakes; nothing
here imports Ray, so the whole HTTP layer runs in a test's own process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.request import Event, GenerateRequest
from actors.stats import EngineStats, EngineStatus
from actors.vetting import Vetting


@dataclass(frozen=True)
class ServedModel:
    """The one model that is served.

    `name` is what requests call it. `context`: most tokens of prompt and answer together.
    `created`: Unix time in seconds. `fingerprint`: changes whenever answers may change.
    `max_body_bytes`: larger request bodies are refused. Reading JSON keeps everybody waiting, for
    0.1 s a MiB at worst (token ids); a million tokens of text are 4 MiB.
    """

    name: str
    context: int
    created: int
    fingerprint: str
    max_body_bytes: int = 16 << 20


class EngineClient(Protocol):
    """The engine as HTTP sees it."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Yield a request's events; the first one, at once, says that it was accepted.

        Before that first event it raises `UnavailableError`, `BusyError` or `ContextLengthError`.
        Closing the iterator (`aclose`) cancels the request.
        """

    async def status(self) -> EngineStatus:
        """Whether the engine serves, and how far loading is."""

    async def stats(self) -> EngineStats | None:
        """The engine's books, None if it does not answer."""


class Decoder(Protocol):
    """Turns tokens into text one by one; holds bytes back until their characters are whole."""

    def push(self, token: int, /) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What the HTTP layer uses of `sharding.gguf.tokenizer.Tokenizer`."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def most_bytes(self) -> int: ...

    @property
    def add_bos(self) -> bool: ...

    @property
    def add_eos(self) -> bool: ...

    @property
    def chat_template(self) -> str | None: ...

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], /, *, skip_special: bool = True) -> str: ...

    def token_bytes(self, token: int, /, *, special: bool = True) -> bytes: ...

    def token_text(self, token: int, /) -> str: ...

    def incremental(
        self, *, skip_special: bool = True, continues: bool = False, shown: Collection[int] = ()
    ) -> Decoder: ...


@dataclass
class Service:
    """One served model with everything that answers for it.

    `model` may be replaced while serving: how long a context fits is known only after loading.
    """

    model: ServedModel
    tokenizer: Tokenizer
    engine: EngineClient
    vetting: Vetting = field(default_factory=Vetting)
