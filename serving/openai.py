"""OpenAI's wire types: what requests may say and what answers look like. No behaviour.

Request fields follow OpenAI's API reference with the common extras of vLLM and llama.cpp. Requests
are strict ("5" is no number, true no integer); null means the default. Unknown fields are kept
aside in `model_extra`, where `prepare.py` looks for those that are known but not supported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_CHOICES = 8
MOST_STOPS = 16
MOST_BIAS = 100
MOST_TOOLS = 512

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


JsonObject = dict[str, Any]


class JsonSchema(_Request):
    """A schema by name, as OpenAI wraps it. `strict` changes nothing: it is always kept to."""

    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Request):
    """What the answer's content shall be. `schema` beside `json_object` is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: JsonObject | None = Field(None, alias="schema")


class StructuredOutputs(_Request):
    """The same as vLLM spells it: one of these. `grammar`: GBNF or Lark."""

    json_: JsonObject | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GuidedRequest(_Request):
    """The fields that say what the answer's content shall be; one of them at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = Field(None, description="vLLM's older spelling.")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = Field(None, description="GBNF as llama.cpp's, or Lark.")
    json_schema: JsonObject | None = Field(None, description="A schema, as llama.cpp takes it.")


class GenerationRequest(GuidedRequest):
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


class CalledFunction(_Request):
    """A function with its arguments: an object as JSON text."""

    name: str
    arguments: str


class ToolCall(_Request):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Request):
    """A message of the conversation. Only an assistant's content may be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="What the assistant thought.")


class Function(_Request):
    """A function that may be called. `parameters`: the JSON schema of its arguments. `strict`:
    refuse the request if that cannot be kept to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(_Request):
    """Only functions are supported."""

    type: Literal["function"]
    function: Function


class FunctionName(_Request):
    """A function by its name."""

    name: str


class NamedTool(_Request):
    """The one tool to call."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most tokens to draw; what is left of the context when left out."
    )
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = Field(None, description="Needs logprobs.")
    add_generation_prompt: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most.")
    chat_template_kwargs: JsonObject | None = Field(
        None, description="More for the chat template, such as enable_thinking."
    )


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


class DetokenizeRequest(_Request):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


Extra = dict[str, Any]
"""`model_extra` of a request."""
