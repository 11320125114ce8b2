"""A model's chat template: from messages to the prompt text that the model was trained on.

The template comes with the model file and is untrusted code: it renders in `sandbox.py`, and
whatever it does wrong becomes an error of the request. Not here: tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from jinja2 import Template, TemplateError

from serving.allowance import Allowance, rendering
from serving.message import THINK, THOUGHT, Thinking
from serving.sandbox import Sandbox
from serving.service import Tokenizer
from sharding.errors import RequestError

CHATML = """\
{% for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""For models that have ChatML's tokens but no template."""

# A template may use this much whatever it is given, and this many times the size of its messages.
_LEAST_OUTPUT_CHARS, _OUTPUT_FACTOR = 4 << 20, 16
_LEAST_VALUE_BYTES, _VALUE_FACTOR = 16 << 20, 16
_LEAST_MEMORY_BYTES, _MEMORY_FACTOR = 256 << 20, 64
_CPU_S = 5.0

# What code that a template steers can raise besides Jinja's own errors. RecursionError is a
# RuntimeError; a MemoryError here is the parser's.
_CRASHES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

Message = Mapping[str, object]


class ChatTemplate:
    """Renders the messages of one model. Compiled once; `render` may run in several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        now: Callable[[], datetime] = datetime.now,
        cpu_s: float = _CPU_S,
    ) -> None:
        self._now = now
        self._cpu_s = cpu_s
        self._source = tokenizer.chat_template or _default_template(tokenizer)
        self._tokens = {
            "bos_token": special_text(tokenizer, tokenizer.bos_id),
            "eos_token": special_text(tokenizer, tokenizer.eos_id),
        }
        self._template: Template | None = None

    @property
    def source(self) -> str:
        """Its text, which tells what the model was trained for."""
        return self._source

    def thinking_after(self, prompt: str) -> Thinking:
        """Whether an answer to a prompt that it made may begin with thinking."""
        if THOUGHT not in self._source:
            return "none"
        end = prompt.rstrip()
        if end.endswith(THINK):
            return "open"
        return "none" if end.endswith(THOUGHT) else "maybe"

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None = None,
        more: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt's text. `tools` as OpenAI's; `more`: what a client gives the template besides.
        Raises `RequestError` with the template's own words if it refuses the messages, breaks or
        exceeds its limits."""
        given: dict[str, object] = {
            **(more or {}),
            "messages": [self._known_role(each) for each in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        try:
            return self._render(given)
        except TemplateError as error:
            reason = error.message or type(error).__name__
        except _CRASHES as error:
            reason = f"{type(error).__name__}: {error}"
        raise RequestError(f"the model's chat template failed: {reason:.1000}", "messages")

    def _render(self, given: Mapping[str, object]) -> str:
        template = self._compiled()
        size = _chars(given)
        allowance = Allowance(
            max(_LEAST_VALUE_BYTES, _VALUE_FACTOR * size),
            max(_LEAST_MEMORY_BYTES, _MEMORY_FACTOR * size),
            self._cpu_s,
        )
        pieces, left = list[str](), max(_LEAST_OUTPUT_CHARS, _OUTPUT_FACTOR * size)
        with rendering(allowance):
            for piece in template.generate(given):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise TemplateError("it writes far more text than its messages hold")
        return "".join(pieces)

    def _compiled(self) -> Template:
        if self._template is None:
            functions = {"raise_exception": _raise, "strftime_now": self._strftime}
            self._template = Sandbox(functions).from_string(self._source)
        return self._template

    def _known_role(self, message: Message) -> Message:
        """A developer message is a system message to templates that do not know the role."""
        if message["role"] == "developer" and "developer" not in self._source:
            return {**message, "role": "system"}
        return message

    def _strftime(self, form: str) -> str:
        if len(form) > 256:
            raise TemplateError("its date format is longer than 256 characters")
        return self._now().strftime(form)


def _chars(value: object) -> int:
    """Characters of all texts in it."""
    total, todo = 0, [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            todo += [*item, *item.values()]
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, str):
            total += len(item)
    return total


def special_text(tokenizer: Tokenizer, token: int | None) -> str:
    """The text of a special token that a model may lack; empty then."""
    return "" if token is None else tokenizer.token_text(token)


def _default_template(tokenizer: Tokenizer) -> str:
    if len(tokenizer.encode("<|im_start|>", add_special=False)) == 1:
        return CHATML
    return "{{ raise_exception('the model file holds none; use /v1/completions') }}"


def _raise(message: object) -> None:
    raise TemplateError(str(message))
