"""What the tests of kernels share: which build is tested, and one thread between tests.

`make sanitize` names the module built with sanitizers in `LONGSPAN_CPU_MODULE`; it is loaded in the
place of the installed one before anything imports that.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

_NAME = "sharding.kernels._cpu"

if wanted := os.environ.get("LONGSPAN_CPU_MODULE"):
    assert _NAME not in sys.modules, f"{_NAME} is imported already"
    spec = importlib.util.spec_from_file_location(_NAME, wanted)
    assert spec is not None and spec.loader is not None, wanted
    sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[_NAME])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test may compute on as many threads as it likes."""
    # Here, since the lines above must come first.
    from sharding.kernels import _cpu
    from sharding.kernels.cpu import use_threads

    before = _cpu.threads()
    yield
    use_threads(before)
