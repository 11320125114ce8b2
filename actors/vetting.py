"""Reads grammars of strangers in a process of its own, before anything that matters does.

A grammar can be such that reading it overflows the stack, or takes minutes or gigabytes, whatever
the library's own limits say. Here that ends a process which nobody misses: it gets `CPU_S` seconds
of computing, little memory and less stack than those who read the grammar after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from sharding.errors import BusyError, RequestError

CPU_S = 2
"""To read one grammar. One of a hundred tools takes a twentieth of a second."""

_MEMORY_MIB = 1024
_STACK_BYTES = 4 << 20
_DYING_S = 1.0
_PATIENCE_S = 20.0  # of a machine that has much else to do
_KEPT = 256
_REASONS = {
    -signal.SIGKILL: "too long on a machine that has so much else to do; try again",
    -signal.SIGSEGV: "a deeper stack than there is: rules refer to rules too often in a row",
    -signal.SIGXCPU: f"more than {CPU_S} s",
}
"""What a reader's status says about a grammar."""


class Vetting:
    """Asks the reader, which is started when it is first needed and anew when it died.
    Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: subprocess.Popen[str] | None = None
        self._known: OrderedDict[str, str] = OrderedDict()

    def check(self, grammar: str) -> None:
        """Raises `RequestError` for a grammar that cannot be used, `BusyError` if others' keep the
        reader busy."""
        complaint = self._known.get(grammar)
        if complaint is None:
            if not self._lock.acquire(timeout=_PATIENCE_S):
                raise BusyError("too many new grammars are being read; try again later")
            try:
                complaint = self._ask(grammar)
            finally:
                self._lock.release()
        if complaint:
            raise RequestError(f"the grammar cannot be used: {complaint}")

    def prepare(self) -> None:
        """Start the reader now, which the first grammar would wait for."""
        self.check("start: /x/")

    def close(self) -> None:
        """End the reader."""
        with self._lock:
            if self._reader is not None:
                self._reader.kill()
            self._end()

    def _ask(self, grammar: str) -> str:
        """What is wrong with a grammar; empty for nothing."""
        if (known := self._known.get(grammar)) is not None:
            return known
        if self._reader is not None and self._reader.poll() is not None:
            self._end()
        self._reader = self._reader or _start()
        told = _exchange(self._reader, grammar)
        if told is None:
            status = self._end()
            what = _REASONS.get(status, f"more than {_MEMORY_MIB} MiB")
            told = f"to read it takes {what}"
            if status == -signal.SIGKILL:  # somebody else's doing: not to be held against it
                return told
        self._known[grammar] = told
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return told

    def _end(self) -> int:
        """The reader's status, if it has ended or is about to by itself."""
        status = 0
        if self._reader is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._reader.wait(_DYING_S)
            self._reader.kill()
            with contextlib.suppress(BrokenPipeError):  # what it was told and did not read
                self._reader.communicate()
            self._reader = None
        return status


def _start() -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[1])
    paths = filter(None, (root, os.environ.get("PYTHONPATH")))
    return subprocess.Popen(
        [sys.executable, "-m", "actors.vetting"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _exchange(reader: subprocess.Popen[str], grammar: str) -> str | None:
    """The reader's word, None if it died of the grammar or was too slow."""
    assert reader.stdin is not None and reader.stdout is not None, "made with pipes"
    late = threading.Timer(_PATIENCE_S, reader.kill)
    late.start()
    try:
        reader.stdin.write(json.dumps(grammar) + "\n")
        reader.stdin.flush()
        line = reader.stdout.readline()
    except OSError:
        return None
    finally:
        late.cancel()
    return json.loads(line) if line.endswith("\n") else None


def main() -> None:
    """The reader: a grammar a line as JSON, to each what is wrong with it. Ends with its input."""
    from actors.grammar import LIMITS, brief, byte_tokenizer

    tokenizer = byte_tokenizer()

    def read(grammar: str, complaint: list[str]) -> None:
        from llguidance import LLMatcher

        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        matcher.deep_copy()
        if not matcher.is_error() and not matcher.is_stopped():
            matcher.compute_bitmask()
        complaint.append(brief(matcher.get_error()) if matcher.is_error() else "")

    resource.setrlimit(resource.RLIMIT_AS, (_used_bytes() + (_MEMORY_MIB << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    for line in sys.stdin:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        # Whole seconds, of which one has begun.
        limit = int(spent.ru_utime + spent.ru_stime) + CPU_S + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        complaint: list[Any] = []
        reading = threading.Thread(target=read, args=(json.loads(line), complaint))
        reading.start()
        reading.join()
        sys.stdout.write(json.dumps(complaint[0]) + "\n")
        sys.stdout.flush()


def _used_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
