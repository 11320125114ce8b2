"""From a request body to requests for the engine: limits, defaults and what is not supported.

Everything that can be refused without the engine is refused here, with the field's name. Not here:
types and ranges of single fields (`openai.py` declares them) and text (`chat.py`,
`completions.py`).
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from actors.request import GenerateRequest
from serving.message import AnswerForm
from serving.openai import Extra, GenerationRequest
from serving.service import ServedModel, Service, Tokenizer
from sharding.batch import SamplingParams
from sharding.errors import ContextLengthError, RequestError, UnknownModelError

MOST_ANSWERS = 128
"""Most answers of one request: prompts times n."""

_OFF: tuple[object, ...] = (None, False, "", [], {})

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (None, True),
    "allowed_token_ids": _OFF,
    "audio": _OFF,
    "bad_words": _OFF,
    "chat_template": _OFF,
    "chat_template_kwargs": _OFF,  # here and below: plain completions have no conversation
    "continue_final_message": _OFF,
    "documents": _OFF,
    "dry_multiplier": (None, 0),
    "dynatemp_range": (None, 0),
    "echo": (None, False),
    "function_call": (*_OFF, "none", "auto"),
    "functions": _OFF,
    "include_stop_str_in_output": _OFF,
    "length_penalty": (None, 1),
    "logits_processors": _OFF,
    "lora": _OFF,
    "mirostat": (None, 0),
    "n_predict": (None,),
    "n_probs": (None, 0),
    "modalities": (*_OFF, ["text"]),
    "prediction": _OFF,
    "priority": (None, 0),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None, "none"),
    "repeat_last_n": (None, -1),
    "return_token_ids": _OFF,
    "return_token_strs": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "samplers": _OFF,
    "suffix": _OFF,
    "tool_choice": (*_OFF, "none", "auto"),
    "tools": _OFF,
    "top_n_sigma": (None, -1),
    "truncate_prompt_tokens": (None,),
    "typical_p": (None, 1),
    "use_beam_search": _OFF,
    "web_search_options": (None,),
    "xtc_probability": (None, 0),
}
"""Fields that other servers know, with the values that ask for nothing. Any other value is refused:
silence would look like support."""


@dataclass(frozen=True)
class Job:
    """One HTTP request for answers, ready for the engine.

    `requests`: one for each answer, all `choices` of the first prompt first. `skip`: leave special
    tokens out of the text, but not those `shown`. `prompt_tokens`: of all prompts, each counted
    once. `form`: what an answer's text may hold.
    """

    id: str
    created: int
    model: ServedModel
    requests: list[GenerateRequest]
    choices: int
    stops: list[str]
    skip: bool
    include_usage: bool
    prompt_tokens: int
    return_progress: bool = False
    form: AnswerForm = AnswerForm()
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Scores:
    """How many log-probabilities are wanted beside each drawn and each prompt token; None: none."""

    drawn: int | None = None
    prompt: int | None = None


def check_model(name: str | None, model: ServedModel) -> None:
    """Raises `UnknownModelError` unless `name` is served; None means whatever is."""
    if name is not None and name != model.name:
        message = f"the model {name:.200} is not served; served: {model.name}"
        raise UnknownModelError(message, "model")


def refuse_unsupported(extra: Extra | None) -> None:
    """Raises `RequestError` for a known field that asks for something unsupported."""
    for name, value in (extra or {}).items():
        if name in UNSUPPORTED and not _is_one_of(value, UNSUPPORTED[name]):
            raise RequestError(f"{name} is not supported by this server; leave it out", name)


def _is_one_of(value: object, neutral: Sequence[object]) -> bool:
    """Like `in`, but false is not 0."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )


def check_body(body: GenerationRequest, service: Service) -> None:
    """Everything about `body` that can be judged without its prompt."""
    check_model(body.model, service.model)
    refuse_unsupported(body.model_extra)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported unless it equals n", "best_of")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream", "stream_options")
    spellings = {body.repetition_penalty, body.repeat_penalty} - {None}
    if len(spellings) > 1:
        message = "repeat_penalty and repetition_penalty are the same and must not differ"
        raise RequestError(message, "repeat_penalty")
    biased = list(map(int, body.logit_bias or {}))
    check_tokens(biased, service.tokenizer, "logit_bias")
    stops = body.stop_token_ids or []
    check_tokens(stops, service.tokenizer, "stop_token_ids")
    if body.min_tokens and len({*stops, *_stops(body, service.tokenizer)}) >= (
        service.tokenizer.vocab_size
    ):
        message = "stop_token_ids are all tokens, and min_tokens bans them: none is left to draw"
        raise RequestError(message, "stop_token_ids")


def check_tokens(ids: Sequence[int], tokenizer: Tokenizer, param: str) -> None:
    """Raises `RequestError` for an id that the vocabulary does not have."""
    largest = max(ids, default=0)
    if largest >= tokenizer.vocab_size:
        message = f"{param}: there is no token {largest}; ids are below {tokenizer.vocab_size}"
        raise RequestError(message, param)


def check_length(text: str, service: Service) -> None:
    """Raises `ContextLengthError` for a text that no tokenizing could make short enough: that
    takes seconds for what is refused anyway."""
    size, context = len(text.encode()), service.model.context
    least = size // service.tokenizer.most_bytes
    if least > context:
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, your prompt has"
            f" {size} bytes, which are at least {least} tokens. Shorten the prompt.",
            None,
        )


def build_job(
    kind: str,
    body: GenerationRequest,
    service: Service,
    prompts: list[list[int]],
    scores: Scores,
    grammar: str = "",
) -> Job:
    """The engine's requests for `prompts`. `kind` begins the answer's id; `grammar`: what answers
    must follow.

    Raises `RequestError` for too many answers and `ContextLengthError` where a prompt and its
    answer exceed the context.
    """
    n = body.n or 1
    if len(prompts) * n > MOST_ANSWERS:
        message = f"{len(prompts)} prompts times n {n} exceed {MOST_ANSWERS} answers"
        raise RequestError(f"{message}; send several requests", "prompt")
    job_id, sampling = f"{kind}-{uuid.uuid4().hex}", _sampling(body, service.tokenizer, scores)
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        max_tokens = _max_tokens(body, len(prompt), service.model.context)
        for choice in range(n):
            requests.append(
                GenerateRequest(
                    request_id=f"{job_id}-{len(requests)}",
                    prompt=prompt,
                    max_tokens=max_tokens,
                    sampling=_seeded(sampling, body.seed, choice),
                    prompt_logprobs=scores.prompt,
                    cached=body.cache_prompt is not False,
                    cache_salt=body.cache_salt or "",
                    grammar=grammar,
                )
            )
    return Job(
        id=job_id,
        created=int(time.time()),
        model=service.model,
        requests=requests,
        choices=n,
        stops=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        skip=body.skip_special_tokens is not False,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        prompt_tokens=sum(map(len, prompts)),
        return_progress=bool(body.return_progress),
    )


def _max_tokens(body: GenerationRequest, prompt_tokens: int, context: int) -> int:
    wanted = body.max_completion_tokens or body.max_tokens
    least = 1 if wanted is None else wanted
    if prompt_tokens + least > context:
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, you requested"
            f" {prompt_tokens + least} tokens ({prompt_tokens} in the prompt, {least} in the"
            f" completion). Shorten the prompt or lower max_tokens.",
            "max_tokens" if prompt_tokens < context else None,
        )
    max_tokens = context - prompt_tokens if wanted is None else wanted
    if (body.min_tokens or 0) > max_tokens:
        message = f"min_tokens {body.min_tokens} exceeds max_tokens {max_tokens}"
        raise RequestError(message, "min_tokens")
    return max_tokens


def _stops(body: GenerationRequest, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The model's own tokens that end an answer, if they shall."""
    return () if body.ignore_eos else tokenizer.stop_ids


def _sampling(body: GenerationRequest, tokenizer: Tokenizer, scores: Scores) -> SamplingParams:
    stops = _stops(body, tokenizer)
    return SamplingParams(
        temperature=_given(body.temperature, 1.0),
        top_k=min(max(body.top_k or 0, 0), tokenizer.vocab_size),
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty or body.repeat_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        min_tokens=body.min_tokens or 0,
        stop_ids=tuple(dict.fromkeys((*stops, *(body.stop_token_ids or ())))),
        logprobs=scores.drawn,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _seeded(sampling: SamplingParams, seed: int | None, choice: int) -> SamplingParams:
    """Choices of one prompt draw differently; a prompt draws the same alone and among others."""
    if seed is None:
        seed, choice = random.getrandbits(63), 0
    # Seeds are 64-bit integers that wrap around.
    wrapped = (seed + choice + (1 << 63)) % (1 << 64) - (1 << 63)
    return msgspec.structs.replace(sampling, seed=wrapped)
