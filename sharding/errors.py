"""The error tree of the whole project, and what torch raises beside it; nothing else.

    LongspanError                   everything that a user or a machine can cause
    ├── ModelFileError              a model file cannot be used
    │   ├── CorruptFileError        truncated, hostile or contradictory bytes
    │   └── UnsupportedModelError   valid GGUF, but nothing here computes it
    ├── FetchError                  the demo model could not be downloaded or verified
    ├── ConfigError                 an option or a configuration key is wrong
    ├── DoesNotFitError             weights or KV exceed the memory of the devices
    ├── RequestError                this request cannot be served as asked (names the parameter)
    │   ├── ContextLengthError      prompt and answer exceed the context
    │   └── UnknownModelError       no such model is served
    ├── BusyError                   too many requests wait; try again later
    ├── UnavailableError            loading or repairing; try again later
    ├── GrafanaError                Grafana does not answer, or refuses
    └── PipelineError               the pipeline broke while it worked
        ├── PeerLostError           the other end of a stage edge is gone
        ├── ProtocolError           bytes on a stage edge that no peer of ours would send
        ├── StageError              a stage is alive but could not do its part
        ├── DeviceLostError         a stage's GPU failed: its process cannot compute any more
        └── RepeatedLossError       it broke each time that it worked on one request

A message carries the numbers and the remedy. Foreign exceptions are translated where they enter
(Ray's in `stage_actor` and `placement`, sockets' in `transport`, Grafana's in `grafana`);
`serving/errors.py` maps this tree to HTTP. Exceptions here survive pickling: each passes every
constructor argument to `Exception.__init__`.
"""


class LongspanError(Exception):
    """Base of everything that this project raises on purpose."""


class ModelFileError(LongspanError):
    """A model file cannot be used."""


class CorruptFileError(ModelFileError):
    """Truncated, hostile or contradictory bytes in a model file."""


class UnsupportedModelError(ModelFileError):
    """A valid GGUF file whose architecture, quantisation or tokenizer nothing here computes."""


class FetchError(LongspanError):
    """A model could not be downloaded or does not have the expected SHA-256."""


class ConfigError(LongspanError):
    """An option or a configuration key has a value that cannot work."""


class DoesNotFitError(LongspanError):
    """Weights or KV exceed memory. `max_context`: tokens of the largest that would fit."""

    def __init__(self, message: str, max_context: int) -> None:
        super().__init__(message, max_context)
        self.max_context = max_context

    def __str__(self) -> str:
        return str(self.args[0])


class RequestError(LongspanError):
    """A request cannot be served as asked. `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])


class ContextLengthError(RequestError):
    """Prompt and answer together exceed the context."""


class UnknownModelError(RequestError):
    """No model of that name is served."""


class BusyError(LongspanError):
    """Too many requests wait already. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class UnavailableError(LongspanError):
    """The engine is loading or repairing. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class GrafanaError(LongspanError):
    """Grafana does not answer, or refuses. `status`: HTTP's; 0 if there was no proper answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class PipelineError(LongspanError):
    """The pipeline of stages broke while it worked."""


class PeerLostError(PipelineError):
    """The other end of a stage edge closed, died or stopped answering."""


class ProtocolError(PipelineError):
    """Bytes on a stage edge that no peer of ours would send."""


class StageError(PipelineError):
    """A stage is alive but could not do its part of a step."""


class DeviceLostError(PipelineError):
    """The device of a stage failed in use: only a new process may find it working again."""


class RepeatedLossError(PipelineError):
    """Whatever worked on a request broke each time: it may be the cause, and had better not be sent
    again."""


COMPUTING_FAILED: tuple[type[Exception], ...] = (RuntimeError, IndexError, MemoryError)
"""What torch raises where a batch cannot be computed, above all when memory is short."""
