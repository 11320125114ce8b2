"""llama.cpp's own server in this process, for measurements beside ours over HTTP."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def llama_server(path: Path, context: int, slots: int) -> Iterator[str]:
    """Its address while it runs, on all cores, with `slots` of `context` tokens over one KV."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context * slots
    params.n_parallel = slots
    params.kv_unified = True
    params.use_jinja = True
    threads = len(os.sched_getaffinity(0))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port = 0
    saved, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    try:
        server = xllamacpp.Server(params)
        yield str(server.listening_address)
        del server
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(quiet)
