"""`make gpu-test`: the GPU kernels' tests on this machine's GPU, or what is missing for them.

Needs of Longspan's packages only gguf and msgspec, beside torch, Triton, numpy, pytest and
hypothesis: neither the compiled CPU kernels nor Ray.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from sharding.errors import LongspanError

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "test_triton_stage.py",
    "test_triton.py",
    "test_triton_digits.py",
    "test_triton_graphs.py",
)
MOST_PROCESSES = 8


def main() -> int:
    """Say what the tests run on, and run them."""
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import torch
        import triton

        from sharding.kernels.triton import choose_device

        device = choose_device()
    except (ImportError, LongspanError) as missing:
        sys.stderr.write(f"gpu-test: nothing was tested: {missing}\n")
        return 1
    major, minor = torch.cuda.get_device_capability(device)
    sys.stdout.write(
        f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, "
        f"CUDA {torch.version.cuda}, torch {torch.__version__}, Triton {triton.__version__}\n"
    )
    sys.stdout.flush()
    files = [str(ROOT / "tests" / "sharding" / "kernels" / name) for name in FILES]
    # Neither the suite's settings nor its shared fixtures, which ask for what is not needed here.
    plain = ["-c", os.devnull, "--rootdir", str(ROOT), "--noconftest", "-p", "no:cacheprovider"]
    return int(pytest.main([*plain, "-q", "--durations=5", *_side_by_side(), *files]))


def _side_by_side() -> list[str]:
    """Processes, where pytest-xdist is: nearly all of the time is Triton's compiler and the slow
    twin on the host."""
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    if importlib.util.find_spec("xdist") is None or processes < 2:
        return []
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    return ["-n", str(processes)]


if __name__ == "__main__":
    sys.exit(main())
