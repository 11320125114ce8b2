"""POST /v1/completions: raw prompts, in all four forms, with echo and the older logprobs format.

Not here: drawing and cancelling (`answers.py`), fields shared with chat (`prepare.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serving.grammars import content_grammar
from serving.openai import CompletionRequest
from serving.openai_answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionProgress,
    FinishReason,
    PromptProgress,
    Usage,
)
from serving.prepare import Job, Scores, build_job, check_body, check_length, check_tokens
from serving.service import Service, Tokenizer
from serving.text import Piece, PlacedToken, finite, token_name
from serving.wishes import content_wish, vet
from sharding.batch import Choice
from sharding.errors import PipelineError, RequestError


def prepare_completion(body: CompletionRequest, service: Service) -> tuple[Job, CompletionWording]:
    """The engine's requests for a body's prompts, and how to word their answers. Slow for long
    prompts: run it in a thread.

    Raises `RequestError` and its kind for everything that cannot be served.
    """
    check_body(body, service)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens 0 needs echo: it would answer nothing", "max_tokens")
    tokenizer = service.tokenizer
    texts = _texts(body.prompt)
    for text in texts:
        if isinstance(text, str):
            check_length(text, service)
    prompts = [tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    for ids in prompts:
        check_tokens(ids, tokenizer, "prompt")
        if not ids:
            raise RequestError("prompt is empty; at least one token is needed", "prompt")
    scores = Scores(body.logprobs, body.logprobs if body.echo else None)
    content, param = content_wish(body)
    grammar = "" if content is None else content_grammar(content)
    if grammar:
        vet(grammar, service.vetting, param)
    job = build_job("cmpl", body, service, prompts, scores, grammar)
    if not body.echo:
        return job, CompletionWording(job, tokenizer)
    n = len(job.requests) // len(prompts)
    return job, CompletionWording(job, tokenizer, [text for text in texts for _ in range(n)])


def _texts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One entry for each prompt."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [part for part in prompt if isinstance(part, int)]
    return [ids] if ids else [part for part in prompt if not isinstance(part, int)]


class CompletionWording:
    """Words answers as `text_completion` objects."""

    def __init__(
        self, job: Job, tokenizer: Tokenizer, echoes: Sequence[str | list[int]] = ()
    ) -> None:
        """`echoes`: each choice's prompt as it was given, to be said before its answer."""
        self._job = job
        self._tokenizer = tokenizer
        self._echoes = [_Echo(job, tokenizer, *echo) for echo in enumerate(echoes)]
        self._with_logprobs = job.requests[0].sampling.logprobs is not None

    def opening(self) -> Iterator[Completion]:
        """The prompts, where nothing about them must be computed first."""
        for index, echo in enumerate(self._echoes):
            if echo.said_at_once():
                yield self._chunk(index, echo.text)

    def chunks(self, index: int, piece: Piece) -> Iterator[Completion]:
        """The prompt once it is scored, the text, and at the end why it ended."""
        if self._echoes:
            echo = self._echoes[index]
            if echo.hear(piece):
                yield self._chunk(index, echo.text, echo.logprobs())
        if piece.text or (piece.tokens and self._with_logprobs):
            yield self._chunk(index, piece.text, self._logprobs(index, piece.tokens))
        if piece.finish_reason is not None:
            yield self._chunk(index, "", finish_reason=piece.finish_reason)

    def progress(self, index: int, progress: PromptProgress) -> CompletionProgress:
        """An empty text, with what was read of the prompt."""
        return CompletionProgress(**dict(self._chunk(index, "")), prompt_progress=progress)

    def closing(self, usage: Usage) -> Completion:
        """The usage, without choices."""
        return self._answer([], usage)

    def whole(self, answers: list[list[Piece]], usage: Usage) -> Completion:
        """All choices as one object."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        return self._answer(choices, usage)

    def _choice(self, index: int, pieces: list[Piece]) -> CompletionChoice:
        logprobs = self._logprobs(index, [token for piece in pieces for token in piece.tokens])
        text = "".join(piece.text for piece in pieces)
        if self._echoes:
            echo = self._echoes[index]
            for piece in pieces:
                echo.hear(piece)
            text = echo.text + text
            if logprobs is not None:
                logprobs = _joined(echo.logprobs(), logprobs)
        return CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=pieces[-1].finish_reason
        )

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: CompletionLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> Completion:
        choice = CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason
        )
        return self._answer([choice])

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._job.id,
            created=self._job.created,
            model=self._job.model.name,
            system_fingerprint=self._job.model.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, index: int, tokens: Sequence[PlacedToken]) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        before = len(self._echoes[index].text) if self._echoes else 0
        choices = [token.choice for token in tokens]
        offsets = [before + token.start for token in tokens]
        return _as_lists(self._tokenizer, choices, offsets)


class _Echo:
    """One choice's prompt: its text, and its tokens' scores as they come."""

    def __init__(self, job: Job, tokenizer: Tokenizer, index: int, given: str | list[int]) -> None:
        # A text is repeated with the special tokens that it spells out.
        self._skip = job.skip and not isinstance(given, str)
        self.text = (
            given if isinstance(given, str) else tokenizer.decode(given, skip_special=self._skip)
        )
        self._prompt = job.requests[index].prompt
        # What the tokenizer puts around a text is not part of it.
        text, length = isinstance(given, str), len(self._prompt)
        self._inner = range(text and tokenizer.add_bos, length - (text and tokenizer.add_eos))
        self._scored = job.requests[index].prompt_logprobs is not None
        self._scores: list[Choice] = []
        self._tokenizer = tokenizer
        self._said = False

    def said_at_once(self) -> bool:
        """Whether the prompt is said without waiting for the engine's scores."""
        self._said = not self._scored
        return self._said

    def hear(self, piece: Piece) -> bool:
        """Take a piece's scores; True once, when the last of them is there.

        Raises `PipelineError` when the answer ends before.
        """
        self._scores += piece.prompt_scores
        complete = not self._scored or len(self._scores) == len(self._prompt) - 1
        if piece.finish_reason is not None and not complete:
            raise PipelineError(
                f"the engine scored {len(self._scores)} of {len(self._prompt) - 1} prompt tokens"
            )
        news, self._said = complete and not self._said, self._said or complete
        return news

    def logprobs(self) -> CompletionLogprobs | None:
        """The prompt's tokens; the first has no score, since nothing precedes it."""
        if not self._scored:
            return None
        decoder, offset, offsets = self._tokenizer.incremental(skip_special=self._skip), 0, []
        for place, token in enumerate(self._prompt):
            offsets.append(min(offset, len(self.text)))
            said = decoder.push(token)
            offset += len(said) if place in self._inner else 0
        return _as_lists(self._tokenizer, [Choice(self._prompt[0]), *self._scores], offsets)


def _as_lists(
    tokenizer: Tokenizer, choices: Sequence[Choice], offsets: list[int]
) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token_name(tokenizer, choice.token) for choice in choices],
        token_logprobs=[None if c.logprob is None else finite(c.logprob) for c in choices],
        top_logprobs=[_top(tokenizer, choice) for choice in choices],
        text_offset=offsets,
    )


def _top(tokenizer: Tokenizer, choice: Choice) -> dict[str, float] | None:
    """The likeliest tokens and the drawn one, by name."""
    if choice.logprob is None:
        return None
    named = {token_name(tokenizer, token): finite(logprob) for token, logprob in choice.top}
    named.setdefault(token_name(tokenizer, choice.token), finite(choice.logprob))
    return named


def _joined(first: CompletionLogprobs | None, then: CompletionLogprobs) -> CompletionLogprobs:
    if first is None:
        return then
    return CompletionLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=first.top_logprobs + then.top_logprobs,
        text_offset=first.text_offset + then.text_offset,
    )
