"""OpenAI's wire types: what answers look like. No behaviour; requests are in `openai.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


class PromptDetails(BaseModel):
    """`cached_tokens`: prompt tokens whose KV was there already."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens read and drawn. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token with its log-probability. `bytes`: its UTF-8, or a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A drawn token and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token of the content."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """A function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The model's message; what it does not hold is left out, but for its content."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, exclude_if=_is_none)
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=_is_none)


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _Answer(BaseModel):
    """What all answers and chunks share. `created`: Unix time in seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Answer):
    """A whole chat answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(BaseModel):
    """What a chunk adds to a called function: its name, or more of its arguments."""

    name: str | None = Field(default=None, exclude_if=_is_none)
    arguments: str


class ToolCallDelta(BaseModel):
    """What a chunk adds to call number `index`; the first one has its id."""

    index: int
    id: str | None = Field(default=None, exclude_if=_is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=_is_none)
    function: FunctionDelta


class Delta(BaseModel):
    """What a chunk adds to a message. Fields that it does not add are left out: clients that merge
    deltas would take a null for a value."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    content: str | None = Field(default=None, exclude_if=_is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=_is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=_is_none)


class ChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(_Answer):
    """A piece of a streamed chat answer; the one with usage has no choices."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class PromptProgress(BaseModel):
    """How far a prompt of `total` tokens was read: `processed` of them, with the `cache`d ones,
    whose KV was there; `time_ms`: since the request was accepted. As llama.cpp's."""

    total: int
    cache: int
    processed: int
    time_ms: int


class ChatProgress(ChatChunk):
    """A chunk that adds nothing to the answer."""

    prompt_progress: PromptProgress


class CompletionLogprobs(BaseModel):
    """Parallel lists over tokens; null where nothing precedes a token. `text_offset`: where a token
    begins in the choice's text, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or what a chunk adds to it (`finish_reason` is null until the last)."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(_Answer):
    """A whole completion, or a piece of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionProgress(Completion):
    """A chunk that adds nothing to the answer."""

    prompt_progress: PromptProgress


class ModelCard(BaseModel):
    """A served model. `max_model_len`: its context in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "longspan"
    max_model_len: int


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenPiece(BaseModel):
    """A token with its text, or its bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(BaseModel):
    """Token ids, or pieces where asked for."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int


class DetokenizeAnswer(BaseModel):
    """The text under both names: `prompt` as vLLM spells it, `content` as llama.cpp does."""

    prompt: str
    content: str


class TokenizerInfo(BaseModel):
    """What a client needs to prepare prompts by itself."""

    vocab_size: int
    max_model_len: int
    add_bos_token: bool
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    stop_token_ids: list[int]
    chat_template: str | None


class Health(BaseModel):
    """The engine's state; `progress` is the share of the weights loaded, 0 to 1."""

    status: Literal["loading", "ready", "repairing", "failed"]
    progress: float
    detail: str


class Version(BaseModel):
    """The program's version."""

    version: str
