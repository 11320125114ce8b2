"""OpenAI's wire types: what requests may say and what answers look like. No behaviour.

Request fields follow OpenAI's API reference with the common extras of vLLM and llama.cpp. Requests
are strict ("5" is no number, true no integer); null means the default. Unknown fields are kept
aside in `model_extra`, where `prepare.py` looks for those that are known but not supported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer

MOST_CHOICES = 8
MOST_STOPS = 16
MOST_BIAS = 100

TokenId = Annotated[int, Field(ge=0)]
# Lists are given up at their first fault: to word one for each of millions takes minutes.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Logprobs = Annotated[int, Field(ge=0, le=20)]


def _first_fault(biases: object) -> object:
    """pydantic would word a fault for each entry of a dictionary."""
    for token, bias in biases.items() if isinstance(biases, dict) else ():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"{token!r:.40} is not the number of a token")
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not (number and -MOST_BIAS <= bias <= MOST_BIAS):
            raise ValueError(f"the bias of {token} is {bias!r:.40}, not within -100 and 100")
    return biases


class _Request(BaseModel):
    """A request body: strict, finite, unknown fields allowed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Request):
    """`include_usage`: one more chunk at the end, without choices, that says the usage."""

    include_usage: bool | None = None


class GenerationRequest(_Request):
    """The fields that chat and plain completions share."""

    model: str | None = Field(None, description="A served name; the one model when left out.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Most tokens to draw; what is left of the context when left out."
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Newer name of max_tokens; wins if both are given."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="-1 and 0 switch it off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] | None = Field(
        None, description="Another spelling of repetition_penalty."
    )
    logit_bias: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)],
        ]
        | None,
        BeforeValidator(_first_fault),
    ] = Field(None, description="What to add to the logits of token ids.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: int | None = Field(None, description="Supported where it equals n.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None
    ) = None
    stop_token_ids: TokenIds | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_prompt: bool | None = Field(
        None, description="False: read all of the prompt, also what the KV is there of already."
    )
    return_progress: bool | None = Field(
        None, description="With stream: tell how much of the prompt was read, in chunks of its own."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Share KV only with requests of the same salt."
    )


class TextPart(_Request):
    """A part of a message's content. Only text is supported."""

    type: str = Field(description="Supported: text.")
    text: str | None = None


class ChatMessage(_Request):
    """A message of the conversation. Only an assistant's content may be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most tokens to draw; what is left of the context when left out."
    )
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = Field(None, description="Needs logprobs.")
    add_generation_prompt: bool | None = None


Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions. `max_tokens` 0 needs `echo`: it only scores the prompt."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Logprobs | None = None


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


class AnswerMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


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


class Delta(BaseModel):
    """What a chunk adds to a message; fields that it does not add are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def only_what_is_added(self) -> dict[str, str]:
        """Clients that merge deltas would take a null for a value."""
        fields = {"role": self.role, "content": self.content}
        return {name: value for name, value in fields.items() if value is not None}


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


class TokenizeRequest(_Request):
    """The body of POST /tokenize: `prompt` as vLLM spells it or `content` as llama.cpp does.

    Special tokens are added by default to a `prompt` and not to a `content`, as these two do.
    """

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Another spelling of add_special.")
    parse_special: bool | None = None
    with_pieces: bool | None = None


class TokenPiece(BaseModel):
    """A token with its text, or its bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(BaseModel):
    """Token ids, or pieces where asked for."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int


class DetokenizeRequest(_Request):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


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


Extra = dict[str, Any]
"""`model_extra` of a request."""
