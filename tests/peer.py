"""llama.cpp in this process (the wheel `xllamacpp`), as the judge of what is right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xllamacpp


class Peer:
    """A model that llama.cpp serves."""

    def __init__(self, server: xllamacpp.Server) -> None:
        self._server = server

    def next_logprobs(
        self, tokens: list[int], most: int, drawn_id: int | None = None
    ) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens to follow, likeliest first.

        They are the model's own, from before any sampler; `ignore_eos` only makes llama.cpp answer
        where the likeliest token would end the text. Where that may be a piece of a character, of
        which it does not tell either, another one must be drawn.
        """
        request: dict[str, Any] = {
            "prompt": tokens,
            "n_predict": 1,
            "temperature": 0,
            "ignore_eos": True,
            "n_probs": most,
            "cache_prompt": True,
        }
        if drawn_id is not None:
            request["logit_bias"] = [[drawn_id, 1000.0]]
        answer: dict[str, Any] = self._server.handle_completions(request)
        (drawn,) = answer["choices"][0]["logprobs"]["content"]
        return {found["id"]: found["logprob"] for found in drawn["top_logprobs"]}


@contextlib.contextmanager
def llama_cpp(path: Path, context: int, threads: int = 2) -> Iterator[Peer]:
    """Load a model, one request at a time, FP16 KV; its chatter on stderr is dropped."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port = 0
    with _no_stderr():
        server = xllamacpp.Server(params)
        try:
            yield Peer(server)
        finally:
            del server


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    saved, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(quiet)
