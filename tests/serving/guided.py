"""A server whose model has no mind of its own: it says anything that a request's grammar allows,
by chance. What its answers are like is the server's doing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from actors.grammar import Grammars
from actors.request import LENGTH, STOP, Event, GenerateRequest
from actors.vetting import Vetting
from serving.http import create_app
from serving.service import Service
from sharding.batch import Choice
from sharding.gguf.tokenizer import Tokenizer
from tests.serving.fakes import MODEL, ScriptedEngine, World
from tests.tiny_gguf import bpe_vocabulary

VETTING = Vetting()
"""One reader for all: each takes most of a second to start."""

TALK = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def tokenizer(template: str = TALK, *control: str) -> Tokenizer:
    """A byte-level one with a chat template, and more control tokens."""
    metadata: dict[str, Any] = bpe_vocabulary()
    names, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.tokens"] = [*names, *control]
    metadata["tokenizer.ggml.token_type"] = np.append(kinds, np.full(len(control), 3, kinds.dtype))
    return Tokenizer.from_metadata(metadata | {"tokenizer.chat_template": template})


class GuidedEngine(ScriptedEngine):
    """Draws by the request's seed. Where an answer or a text in it may end, it soon does. First it
    tries to say `begin`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.begin = ""
        self._tokenizer = tokenizer
        self._grammars = Grammars(lambda: tokenizer)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        rng = random.Random(request.sampling.seed)
        constraint = self._grammars.compile(request.grammar or "start: /[a-z ]{1,40}/")
        yield Event()
        drawn, plan = 0, self._tokenizer.encode(self.begin, add_special=False)
        while not constraint.complete:
            assert constraint.error is None
            mask = np.unpackbits(np.frombuffer(constraint.allowed, np.uint8), bitorder="little")
            allowed = np.flatnonzero(mask).tolist()
            token = plan.pop(0) if plan and plan[0] in allowed else self._pick(allowed, rng)
            if token in self._tokenizer.stop_ids:
                yield Event(tokens=[Choice(token)], finish_reason=STOP)
                return
            forced = constraint.take(token, 0 if plan else request.max_tokens - drawn - 1)
            tokens = [token, *forced]
            drawn += len(tokens)
            ended = constraint.complete or drawn >= request.max_tokens
            reason = (STOP if constraint.complete else LENGTH) if ended else None
            yield Event(tokens=list(map(Choice, tokens)), finish_reason=reason)
            if ended:
                return

    def _pick(self, allowed: list[int], rng: random.Random) -> int:
        stops = [token for token in allowed if token in self._tokenizer.stop_ids]
        ends = [token for token in allowed if self._tokenizer.token_bytes(token)[:1] in b'"<[{']
        for likely in (stops, ends):
            if likely and rng.random() < 0.3:
                return rng.choice(likely)
        return rng.choice(allowed)


class GuidedWorld(World):
    """An application on a `GuidedEngine`."""

    def __init__(self, template: str = TALK, *control: str) -> None:
        self.tokenizer = tokenizer(template, *control)
        self.engine: GuidedEngine = GuidedEngine(self.tokenizer)
        self.service = Service(MODEL, self.tokenizer, self.engine, VETTING)
        self.app = create_app(self.service)

    @property
    def prompt(self) -> str:
        """Of the last request."""
        return self.tokenizer.decode(self.engine.requests[-1].prompt, skip_special=False)
