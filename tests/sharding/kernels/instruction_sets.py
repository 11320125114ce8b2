"""The compiled kernels for every instruction set that this processor has."""

from __future__ import annotations

from sharding.kernels.cpu import INSTRUCTION_SETS, CPUKernels

KERNELS = {name: CPUKernels(name) for name in INSTRUCTION_SETS}
