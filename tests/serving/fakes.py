"""A tokenizer of single bytes, an engine that follows a script, and a client that can walk away.

With them the HTTP layer is tested whole and in-process: no Ray, no model, no socket.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    MutableMapping,
)
from typing import Any

import httpx
import httpx2
import openai

from actors.request import LENGTH, STOP, Event, GenerateRequest
from actors.stats import EngineStats, EngineStatus
from serving.access import Access
from serving.http import create_app
from serving.service import ServedModel, Service
from sharding.batch import Choice

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
_SPECIAL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}


class ByteTokenizer:
    """Every byte is a token, so each character beyond ASCII is split between tokens."""

    bos_id: int | None = BOS
    eos_id: int | None = EOS
    stop_ids: tuple[int, ...] = (EOS, IM_END)
    vocab_size = 260
    most_bytes = 12
    add_bos = True
    add_eos = False

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        ids = [BOS] if add_special else []
        while text:
            found = [token for token, name in _SPECIAL.items() if text.startswith(name)]
            if parse_special and found:
                ids.append(found[0])
                text = text.removeprefix(_SPECIAL[found[0]])
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        decoder = self.incremental(skip_special=skip_special)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def token_bytes(self, token: int, *, special: bool = True) -> bytes:
        if token < 256:
            return bytes([token])
        return _SPECIAL[token].encode() if special else b""

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("latin-1")

    def incremental(
        self, *, skip_special: bool = True, continues: bool = False, shown: Collection[int] = ()
    ) -> ByteDecoder:
        return ByteDecoder(self, shown if skip_special else range(self.vocab_size))


class ByteDecoder:
    """Whole characters only."""

    def __init__(self, tokenizer: ByteTokenizer, shown: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token, special=token in self._shown))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


Step = Event | BaseException | float | asyncio.Event
Script = Callable[[GenerateRequest], Iterable[Step]]

ACCEPTED = Event()


def choices(text: str) -> list[Choice]:
    """One drawn token for each byte of `text`, without log-probabilities."""
    return [Choice(byte) for byte in text.encode()]


def saying(text: str, finish_reason: str = STOP) -> Script:
    """A script that draws `text` byte by byte and then, for STOP, the end token."""

    def script(request: GenerateRequest) -> Iterable[Step]:
        yield ACCEPTED
        for choice in choices(text)[:-1]:
            yield Event(tokens=[choice])
        last = choices(text)[-1:]
        end = [*last, Choice(EOS)] if finish_reason == STOP else last
        yield Event(tokens=end, finish_reason=finish_reason)

    return script


def scored(request: GenerateRequest) -> Iterable[Step]:
    """A script that scores the prompt if asked and draws "ab", token t at log-probability -t/10
    with "x" always likelier, as many alternatives as asked for."""

    def choice(token: int, wanted: int | None) -> Choice:
        if wanted is None:
            return Choice(token)
        return Choice(token, -token / 10, [(ord("x"), -0.5), (token, -token / 10)][:wanted])

    yield ACCEPTED
    if request.prompt_logprobs is not None:
        for token in request.prompt[1:]:
            yield Event(prompt_scores=[choice(token, request.prompt_logprobs)])
    drawn = [choice(token, request.sampling.logprobs) for token in b"ab"[: request.max_tokens]]
    yield Event(tokens=drawn, finish_reason=LENGTH)


class ScriptedEngine:
    """Follows `script` for each request: yields its events, raises its exceptions, sleeps for its
    numbers and waits for its asyncio events. Keeps the books that tests ask for."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or saying("Hello")
        self.state = EngineStatus("ready", 1.0, "")
        self.books: EngineStats | None = EngineStats(1)
        self.requests: list[GenerateRequest] = []
        self.ended: list[str] = []
        self.cancelled: list[str] = []

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        finished = False
        try:
            for step in self.script(request):
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    finished = step.last
                    yield step
        finally:
            self.ended.append(request.request_id)
            if not finished:
                self.cancelled.append(request.request_id)

    async def status(self) -> EngineStatus:
        return self.state

    async def stats(self) -> EngineStats | None:
        return self.books


MODEL = ServedModel("tiny", context=4096, created=1700000000, fingerprint="fp_test")


class World:
    """An application on a scripted engine, and ways to talk to it."""

    def __init__(
        self,
        script: Script | None = None,
        template: str | None = None,
        model: ServedModel = MODEL,
        keep_alive_s: float = 10.0,
        access: Access | None = None,
    ) -> None:
        self.engine = ScriptedEngine(script)
        self.service = Service(model, ByteTokenizer(template), self.engine)
        self.app = create_app(self.service, access, keep_alive_s=keep_alive_s)

    def post(self, path: str, body: object) -> httpx.Response:
        """POST `body` as JSON."""
        return self.request("POST", path, json.dumps(body).encode())

    def get(self, path: str) -> httpx.Response:
        """GET."""
        return self.request("GET", path)

    def request(
        self,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None = None,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """One exchange from beginning to end."""

        async def run() -> httpx.Response:
            async with self.client() as client:
                sent = {"Content-Type": content_type} | (headers or {})
                return await client.request(method, path, content=content, headers=sent)

        return asyncio.run(run())

    def client(self) -> httpx.AsyncClient:
        """An HTTP client that calls the application directly."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    def chat(self, text: str = "hi", **fields: object) -> httpx.Response:
        """A chat of one message."""
        return self.post("/v1/chat/completions", chat_body(text, **fields))

    def complete(self, prompt: object = "hi", **fields: object) -> httpx.Response:
        """A plain completion."""
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    async def with_openai(self, play: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
        """Hand `play` the `openai` client. It speaks through httpx2, httpx's successor."""
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            base_url = "http://test/v1"
            await play(openai.AsyncOpenAI(api_key="none", base_url=base_url, http_client=http))


def chat_body(text: str = "hi", **fields: object) -> dict[str, object]:
    """A chat's body with one message, unless `messages` are given."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def frames(response: httpx.Response) -> list[Any]:
    """A stream's data: objects, and "[DONE]" as it is. Comments are left out."""
    found = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which must have exactly OpenAI's fields."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


class Exchange:
    """One request over bare ASGI: sees each part as it is sent, and can hang up."""

    def __init__(self, world: World, path: str, body: object) -> None:
        self._world = world
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
        }
        self._incoming: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent = b""
        self.status: int | None = None
        self.over = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._world.app(self._scope, self._incoming.get, self._send)

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.sent += message.get("body", b"")
        self.over = message["type"] == "http.response.body" and not message.get("more_body")

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait until `reached` is true; an error after 20 s."""
        async with asyncio.timeout(20):
            while not reached():
                await asyncio.sleep(0.002)

    def hang_up(self) -> None:
        """The client leaves."""
        self._incoming.put_nowait({"type": "http.disconnect"})
