"""What a server is told to do: one frozen model of options, and errors that name the key at fault.

`longspan serve` fills it from the command line, `serve deploy` from the `args` of serve.yaml. Only
`longspan serve` uses `host`, `port` and `address`: under `serve deploy` Ray Serve owns the HTTP
port (`http_options`) and the cluster is already there. Every default is written here and nowhere
else. Not here: what fits into memory, and whether the model file is any good.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from actors.scheduler import LEAST_CHUNK
from serving.access import KEY_VARIABLE
from sharding.errors import ConfigError
from sharding.model.rotation import Stretch

MOST_CHUNK = 16384
"""A step's hidden states must fit into a frame between stages."""


# As browsers send them: small letters, no path. Anything else would match no page, in silence.
_ORIGIN = r"^(\*|https?://[a-z0-9._\-\[\]:]+)$"

MOST_ROPE_SCALE = 1024
"""Beyond any that a model was ever stretched by: a slip of the keyboard."""


class ServeConfig(BaseModel):
    """The options of one server: one model, one pipeline of stages, one HTTP API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        min_length=1,
        description="Path of a .gguf file, the same on every node, or a name `longspan fetch` has",
    )
    model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that clients ask for; default: the file's name without .gguf",
    )
    stages: int = Field(
        default=2, ge=1, le=64, description="Stages that the model's layers are cut into"
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of one request, prompt and answer together; default: the "
        "context the model was trained for, or what fits if that is less",
    )
    kv_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of KV that all running requests share; default: decided at load "
        "from the free memory",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of each stage; default: the cores of a machine, shared by "
        "its stages",
    )
    max_waiting: int = Field(
        default=256, ge=1, description="Requests that may wait; one more is answered with 429"
    )
    prefix_cache: bool = Field(
        default=True,
        description="Whether the KV of prompts and answers is kept while nobody needs its memory, "
        "for requests that begin alike",
    )
    chunk: int | None = Field(
        default=None,
        ge=LEAST_CHUNK,
        le=MOST_CHUNK,
        description="Most tokens of a step, prompt chunks and decoded tokens together; default: "
        "512 on CPUs, 4096 on GPUs",
    )
    ingress_replicas: int = Field(
        default=1, ge=1, le=256, description="Processes that speak HTTP and tokenise"
    )
    kernels: Literal["auto", "cpu", "reference", "triton"] = Field(
        default="auto",
        description="Kernel set that computes the stages: `triton` for NVIDIA GPUs, `cpu` is "
        "compiled, `reference` slow and runs anywhere; `auto` takes GPUs if there are any, else "
        "the first of the others that is built",
    )
    rope_scaling: Literal["none", "linear", "yarn"] | None = Field(
        default=None,
        description="Rotary scaling in place of the file's, for contexts beyond those that the "
        "model was trained for; with `rope_scale`",
    )
    rope_scale: float | None = Field(
        default=None,
        ge=1,
        le=MOST_ROPE_SCALE,
        allow_inf_nan=False,
        description="How many times the context it was trained for a model shall read",
    )
    yarn_orig_ctx: int | None = Field(
        default=None,
        ge=1,
        description="The context it was trained for, in place of what the file says",
    )
    api_key_file: str | None = Field(
        default=None,
        min_length=1,
        description="File with the API keys, one a line; those of the environment variable "
        f"{KEY_VARIABLE} count too, and without any the API is open",
    )
    cors_origins: tuple[Annotated[str, Field(pattern=_ORIGIN)], ...] = Field(
        default=(),
        description="Origins whose pages may call from a browser, such as https://chat.example.org",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that HTTP listens on (`longspan serve` only)",
    )
    port: int = Field(
        default=8000, ge=1, le=65535, description="TCP port of HTTP (`longspan serve` only)"
    )
    address: str | None = Field(
        default=None,
        min_length=1,
        description="Ray cluster to join, as host:port or `auto`; default: start a local one "
        "(`longspan serve` only)",
    )

    @property
    def served_name(self) -> str:
        """The name that clients ask for; a split set goes by what its parts share."""
        stem = Path(self.model).name.removesuffix(".gguf")
        return self.model_name or re.sub(r"-00001-of-\d{5}$", "", stem)

    @property
    def stretch(self) -> Stretch | None:
        """The rotary scaling that was asked for."""
        return stretch_of(self.rope_scaling, self.rope_scale, self.yarn_orig_ctx)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read YAML's `stages: yes` as 1.
        if isinstance(value, bool) and info.field_name != "prefix_cache":
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value

    @model_validator(mode="after")
    def _full_context_can_run(self) -> Self:
        if self.context and self.kv_tokens and self.kv_tokens < self.context:
            raise ValueError(
                f"kv_tokens {self.kv_tokens} is below context {self.context}, so no request of "
                f"the full context could run; raise kv_tokens or lower context"
            )
        return self

    @model_validator(mode="after")
    def _scaling_is_whole(self) -> Self:
        try:
            stretch_of(self.rope_scaling, self.rope_scale, self.yarn_orig_ctx)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


def stretch_of(scaling: str | None, scale: float | None, trained: int | None) -> Stretch | None:
    """The rotary scaling that options ask for, None if they ask for none in place of the file's.
    Raises `ConfigError` for options that do not go together."""
    if scaling is None:
        if scale is not None or trained is not None:
            given = "rope_scale" if scale is not None else "yarn_orig_ctx"
            raise ConfigError(f"{given} needs rope_scaling: linear or yarn")
        return None
    if scaling == "none":
        if scale is not None:
            raise ConfigError("rope_scale goes with rope_scaling linear or yarn, not none")
        return Stretch("none", 1.0, trained)
    if scale is None:
        raise ConfigError(f"rope_scaling {scaling} needs rope_scale, such as 4")
    return Stretch(scaling, scale, trained)


def load_config(mapping: object) -> ServeConfig:
    """Validate options. Numbers may come as text, as `serve run … stages=2` gives them.

    Raises `ConfigError` with one line for each key that is wrong.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"the configuration is {mapping!r:.60}; a mapping of keys to values is expected, "
            f"at least `model`"
        )
    try:
        return ServeConfig.model_validate(dict(mapping))
    except ValidationError as error:
        lines = [_line(dict(detail)) for detail in error.errors(include_url=False)]
        raise ConfigError("the configuration is wrong:\n  " + "\n  ".join(lines)) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append: the known word most like this one, or all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(words)}"


def _line(detail: Mapping[str, Any]) -> str:
    """One of pydantic's error details as `key: what is wrong`."""
    key = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"{key}: no such key; {nearest(key, ServeConfig.model_fields)}"
        case "missing":
            return f"{key}: missing; {ServeConfig.model_fields[key].description}"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
        case _:
            _, should, rest = detail["msg"].partition("should")
            return f"{key}: {detail['input']!r:.60} {should}{rest}"
