"""POST /v1/chat/completions: from messages to a prompt, from tokens to a message.

Not here: drawing and cancelling (`answers.py`), fields shared with plain completions
(`prepare.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from serving.conversation import Conversation
from serving.grammars import Calls, answer_grammar, content_grammar, markers_of, special_id
from serving.message import THINK, THOUGHT, AnswerForm, MessagePart, MessageReader
from serving.openai import ChatRequest
from serving.openai_answers import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatProgress,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionDelta,
    PromptProgress,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from serving.openai_answers import ToolCall as ToolCallAnswer
from serving.prepare import Job, Scores, build_job, check_body
from serving.service import Service, Tokenizer
from serving.template import ChatTemplate, special_text
from serving.text import Piece, PlacedToken, finite, token_name
from serving.wishes import content_wish, loosened, vet
from sharding.batch import Choice
from sharding.errors import RequestError


def prepare_chat(body: ChatRequest, service: Service, template: ChatTemplate) -> Job:
    """The engine's requests for a conversation. Slow for long ones: run it in a thread.

    Raises `RequestError` and its kind for everything that cannot be served.
    """
    check_body(body, service)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    conversation = Conversation(body, service, template)
    calls, text = conversation.calls, conversation.text
    ids = _encode(service.tokenizer, text)
    if not ids:
        raise RequestError("the model's chat template made an empty prompt of these", "messages")
    alone = calls is not None and (calls.needed or content_wish(body)[0] is not None)
    form = AnswerForm(template.thinking_after(text), None if calls is None else calls.format, alone)
    grammar = _grammar(body, service, calls, form)
    scores = Scores(drawn=(body.top_logprobs or 0) if body.logprobs else None)
    job = build_job("chatcmpl", body, service, [ids], scores, grammar)
    markers = [] if form.tools is None else markers_of(form.tools)
    tokens = (special_id(service.tokenizer, marker) for marker in (*markers, THINK, THOUGHT))
    return replace(job, form=form, shown=frozenset(each for each in tokens if each is not None))


def _grammar(body: ChatRequest, service: Service, calls: Calls | None, form: AnswerForm) -> str:
    """What answers must follow, empty if nothing."""
    content, param = content_wish(body)
    if content is not None and calls is not None and not calls.format.marker:
        message = f"{param} cannot be followed together with tools: this model's calls are JSON too"
        raise RequestError(message, param)
    tokenizer, vetting = service.tokenizer, service.vetting
    if content is not None:
        vet(content_grammar(content), vetting, param)
    grammar = answer_grammar(tokenizer, content, calls, form.thinking)
    if grammar and calls is None:
        vet(grammar, vetting, param)
    elif calls is not None:
        try:
            vet(grammar, vetting, "tools")
        except RequestError:
            grammar = answer_grammar(tokenizer, content, loosened(calls, vetting), form.thinking)
            vet(grammar, vetting, "tools")
    return grammar


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A template that writes the beginning-of-sequence token itself must not get a second one."""
    bos = special_text(tokenizer, tokenizer.bos_id)
    return tokenizer.encode(text, add_special=not (bos and text.startswith(bos)))


class ChatWording:
    """Words answers as `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._with_logprobs = job.requests[0].sampling.logprobs is not None
        self._readers = [MessageReader(job.form) for _ in job.requests]

    def opening(self) -> Iterator[ChatChunk]:
        """The role, for each choice."""
        for index in range(len(self._job.requests)):
            delta = Delta(role="assistant", content="")
            yield self._chunk([ChunkChoice(index=index, delta=delta)])

    def chunks(self, index: int, piece: Piece) -> Iterator[ChatChunk]:
        """The text, and at the end why it ended."""
        last = piece.finish_reason is not None
        deltas = [_delta(part) for part in self._readers[index].read(piece.text, last)]
        logprobs = self._logprobs(piece.tokens)
        if logprobs is not None and piece.tokens and not deltas:
            deltas = [Delta(content="")]
        for delta in deltas:
            yield self._chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs)])
            logprobs = None  # said once, with the first of what its tokens add
        if last:
            reason = self._reason(index, piece)
            yield self._chunk([ChunkChoice(index=index, delta=Delta(), finish_reason=reason)])

    def _reason(self, index: int, piece: Piece) -> FinishReason:
        assert piece.finish_reason is not None, "asked for at the end"
        called = self._readers[index].called and piece.finish_reason == "stop"
        return "tool_calls" if called else piece.finish_reason

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
        text = "".join(piece.text for piece in pieces)
        return ChatChoice(
            index=index,
            message=_message(self._readers[index].read(text, last=True)),
            logprobs=self._logprobs([token for piece in pieces for token in piece.tokens]),
            finish_reason=self._reason(index, pieces[-1]),
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


def _delta(part: MessagePart) -> Delta:
    """A part of a message as a chunk says it."""
    call = part.call
    if call is None:
        return Delta(content=part.content or None, reasoning_content=part.reasoning or None)
    function = FunctionDelta(name=call.name, arguments=call.arguments)
    more = ToolCallDelta(index=call.index, id=call.id, function=function)
    if call.id is not None:
        more.type = "function"
    return Delta(tool_calls=[more])


def _message(parts: Sequence[MessagePart]) -> AnswerMessage:
    """All parts of a message as one."""
    content = "".join(part.content for part in parts)
    reasoning = "".join(part.reasoning for part in parts)
    calls: list[ToolCallAnswer] = []
    for call in (part.call for part in parts if part.call is not None):
        if call.id is not None and call.name is not None:
            function = CalledFunction(name=call.name, arguments="")
            calls.append(ToolCallAnswer(id=call.id, function=function))
        calls[call.index].function.arguments += call.arguments
    return AnswerMessage(
        content=content or ("" if not calls else None),
        reasoning_content=reasoning or None,
        tool_calls=calls or None,
    )
