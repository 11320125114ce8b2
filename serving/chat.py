"""POST /v1/chat/completions: from messages to a prompt, from tokens to a message.

Not here: drawing and cancelling (`answers.py`), fields shared with plain completions
(`prepare.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serving.openai import ChatMessage, ChatRequest, TextPart
from serving.openai_answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatProgress,
    ChunkChoice,
    Delta,
    PromptProgress,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from serving.prepare import Job, Scores, build_job, check_body, check_length
from serving.service import Service, Tokenizer
from serving.template import ChatTemplate, special_text
from serving.text import Piece, PlacedToken, finite, token_name
from sharding.batch import Choice
from sharding.errors import RequestError

_UNSUPPORTED_IN_MESSAGES = ("tool_calls", "function_call", "audio")


def prepare_chat(body: ChatRequest, service: Service, template: ChatTemplate) -> Job:
    """The engine's requests for a conversation. Slow for long ones: run it in a thread.

    Raises `RequestError` and its kind for everything that cannot be served.
    """
    check_body(body, service)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    messages = [_plain(message, i) for i, message in enumerate(body.messages)]
    for message in messages:
        check_length(str(message["content"]), service)
    text = template.render(messages, body.add_generation_prompt is not False)
    check_length(text, service)
    ids = _encode(service.tokenizer, text)
    if not ids:
        raise RequestError("the model's chat template made an empty prompt of these", "messages")
    scores = Scores(drawn=(body.top_logprobs or 0) if body.logprobs else None)
    return build_job("chatcmpl", body, service, [ids], scores)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A template that writes the beginning-of-sequence token itself must not get a second one."""
    bos = special_text(tokenizer, tokenizer.bos_id)
    return tokenizer.encode(text, add_special=not (bos and text.startswith(bos)))


def _plain(message: ChatMessage, i: int) -> dict[str, object]:
    """A message as templates know it: its content is one string."""
    where = f"messages[{i}]"
    for name in _UNSUPPORTED_IN_MESSAGES:
        if (message.model_extra or {}).get(name):
            field = f"{where}.{name}"
            raise RequestError(f"{field} is not supported by this server; leave it out", field)
    plain: dict[str, object] = {"role": message.role}
    if isinstance(message.content, str):
        plain["content"] = message.content
    elif message.content is not None:
        plain["content"] = _parts_text(message.content, f"{where}.content")
    elif message.role == "assistant":
        plain["content"] = ""
    else:
        raise RequestError(f"{where}.content must not be null", f"{where}.content")
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return plain | {name: value for name, value in optional.items() if value is not None}


def _parts_text(parts: Sequence[TextPart], where: str) -> str:
    for i, part in enumerate(parts):
        if part.type != "text":
            message = f"{where}[{i}]: content of type {part.type!r:.60} is not supported, only text"
            raise RequestError(message, f"{where}[{i}].type")
        if part.text is None:
            raise RequestError(f"{where}[{i}].text is missing", f"{where}[{i}].text")
    return "\n".join(part.text or "" for part in parts)


class ChatWording:
    """Words answers as `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._with_logprobs = job.requests[0].sampling.logprobs is not None

    def opening(self) -> Iterator[ChatChunk]:
        """The role, for each choice."""
        for index in range(len(self._job.requests)):
            delta = Delta(role="assistant", content="")
            yield self._chunk([ChunkChoice(index=index, delta=delta)])

    def chunks(self, index: int, piece: Piece) -> Iterator[ChatChunk]:
        """The text, and at the end why it ended."""
        if piece.text or (piece.tokens and self._with_logprobs):
            delta, logprobs = Delta(content=piece.text), self._logprobs(piece.tokens)
            yield self._chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs)])
        if piece.finish_reason is not None:
            end = ChunkChoice(index=index, delta=Delta(), finish_reason=piece.finish_reason)
            yield self._chunk([end])

    def progress(self, index: int, progress: PromptProgress) -> ChatProgress:
        """An empty delta, with what was read."""
        chunk = self._chunk([ChunkChoice(index=index, delta=Delta())])
        return ChatProgress(**dict(chunk), prompt_progress=progress)

    def closing(self, usage: Usage) -> ChatChunk:
        """The usage, without choices."""
        return self._chunk([], usage)

    def whole(self, answers: list[list[Piece]], usage: Usage) -> ChatCompletion:
        """All choices as one object."""
        return ChatCompletion(
            id=self._job.id,
            created=self._job.created,
            model=self._job.model.name,
            system_fingerprint=self._job.model.fingerprint,
            choices=[self._choice(index, pieces) for index, pieces in enumerate(answers)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: list[Piece]) -> ChatChoice:
        finish_reason = pieces[-1].finish_reason
        assert finish_reason is not None
        return ChatChoice(
            index=index,
            message=AnswerMessage(content="".join(piece.text for piece in pieces)),
            logprobs=self._logprobs([token for piece in pieces for token in piece.tokens]),
            finish_reason=finish_reason,
        )

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._job.id,
            created=self._job.created,
            model=self._job.model.name,
            system_fingerprint=self._job.model.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(content=[self._entry(token.choice) for token in tokens])

    def _entry(self, choice: Choice) -> TokenLogprob:
        drawn = self._named(choice.token, choice.logprob)
        top = [self._named(token, logprob) for token, logprob in choice.top]
        return TokenLogprob(
            token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top
        )

    def _named(self, token: int, logprob: float | None) -> TopLogprob:
        return TopLogprob(
            token=token_name(self._tokenizer, token),
            logprob=finite(logprob),
            bytes=list(self._tokenizer.token_bytes(token)),
        )
