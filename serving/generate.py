"""A model in this process: what `longspan generate` and `longspan bench` run, without Ray or
HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from actors.engine import Engine
from actors.grammar import Grammars
from actors.local import LocalStages, plan_limits
from actors.pipeline import LocalPipeline
from actors.request import GenerateRequest
from actors.vetting import Vetting
from serving.grammars import content_grammar, grammar_content, json_text_content
from serving.wishes import vet
from sharding.batch import SamplingParams
from sharding.errors import ConfigError, ContextLengthError, PipelineError, RequestError
from sharding.gguf.reader import GGUFFile
from sharding.gguf.tokenizer import Tokenizer
from sharding.kernels import best_kernels, device_facts, use_threads
from sharding.model.arch import read_shape
from sharding.model_plan import Wanted, plan_model
from sharding.planner import Device


class LocalModel:
    """Loaded stages and the tokenizer of a model file; a context manager."""

    def __init__(self, path: Path, stages: int, wanted: Wanted, threads: int | None) -> None:
        self.path = path
        self.stages = stages
        cores = len(os.sched_getaffinity(0))
        if threads is not None and threads > cores:
            raise ConfigError(f"--threads {threads} exceeds the {cores} cores of this process")
        self.threads = threads or cores
        if wanted.kernels == "auto":
            wanted = replace(wanted, kernels=best_kernels())
        device = device_facts(wanted.kernels)
        part = device.usable_bytes // stages
        devices = [Device(f"{device.name}, part {number}", part) for number in range(stages)]
        with GGUFFile.open(path) as file:
            planned = plan_model(file, devices, wanted)
            self.vocab = read_shape(file.metadata).vocab
            self.tokenizer = Tokenizer.from_metadata(file.metadata)
        self.context, self.kernels = planned.context, planned.kernels
        self.limits = plan_limits(planned, max_waiting=1)
        use_threads(self.threads, self.kernels)
        self._source = LocalStages(path, planned)
        self.engine = Engine(self._source, Grammars(lambda: self.tokenizer))

    @property
    def pipeline(self) -> LocalPipeline:
        """The bare stages, past the engine: for measurements."""
        return LocalPipeline(self._source.stages)

    def __enter__(self) -> Self:
        self.engine.start()
        self.engine.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.close()


class Generation:
    """One continuation: its text as it comes, then its figures."""

    def __init__(
        self,
        local: LocalModel,
        text: str,
        max_tokens: int,
        sampling: SamplingParams,
        grammar: str = "",
    ) -> None:
        """`grammar`: what the answer must follow (`actors/grammar.py`)."""
        self._local = local
        self._prompt = local.tokenizer.encode(text)
        if not self._prompt:
            raise RequestError("the prompt is empty", "prompt")
        room = local.context - len(self._prompt)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(self._prompt)} tokens, the context holds {local.context}"
            )
        self._request = GenerateRequest(
            "generate",
            self._prompt,
            min(max_tokens, room),
            _with_stops(sampling, local),
            grammar=grammar,
        )
        self.text = ""
        self.token_ids: list[int] = []
        self.ttft_s = 0.0
        self.decode_s = 0.0

    def pieces(self) -> Iterator[str]:
        """The answer, piece by piece. Raises `PipelineError` if the engine fails."""
        decoder = self._local.tokenizer.incremental(continues=True)
        begin = first = time.perf_counter()
        for event in self._local.engine.generate(self._request):
            if event.error is not None:
                raise PipelineError(event.error)
            for choice in event.tokens:
                if not self.token_ids:
                    first = time.perf_counter()
                self.token_ids.append(choice.token)
                yield self._take(decoder.push(choice.token))
        self.ttft_s, self.decode_s = first - begin, time.perf_counter() - first
        yield self._take(decoder.finish())

    def _take(self, piece: str) -> str:
        self.text += piece
        return piece

    @property
    def tok_s(self) -> float:
        """Decode rate after the first token; 0 when there was no second."""
        later = len(self.token_ids) - 1
        return later / self.decode_s if later > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": len(self._prompt),
            "ttft_s": round(self.ttft_s, 4),
            "tok_s": round(self.tok_s, 2),
        }


def form_of(json_schema: Path | None, grammar: Path | None) -> str:
    """The grammar in one of two files, empty without. Raises `ConfigError` for both, or for one
    that cannot be used."""
    if json_schema is not None and grammar is not None:
        raise ConfigError("give either --json-schema or --grammar")
    file = json_schema or grammar
    if file is None:
        return ""
    try:
        text = file.read_text(encoding="utf-8")
        content = grammar_content(text) if json_schema is None else json_text_content(text)
        form = content_grammar(content)
        with closing(Vetting()) as vetting:
            vet(form, vetting, None)
    except (OSError, ValueError, RecursionError, RequestError) as error:
        raise ConfigError(f"{file} cannot be used: {error}") from error
    return form


def _with_stops(sampling: SamplingParams, local: LocalModel) -> SamplingParams:
    return msgspec.structs.replace(sampling, stop_ids=local.tokenizer.stop_ids)


def summary(generation: Generation) -> str:
    """One line for people."""
    record = generation.record()
    return (
        f"{record['prompt_tokens']} prompt tokens, first token after {generation.ttft_s:.2f} s, "
        f"then {generation.tok_s:.1f} tokens/s"
    )
