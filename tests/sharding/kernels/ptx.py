"""Compiled Triton kernels on a CPU: PTX, an instruction at a time, for all threads of a block.

What Triton's interpreter shows is what a kernel means; this shows what its compiler made of it,
above all where assembly and layouts are involved. It refuses memory outside of what it was given.
Copies to shared memory come as late as their waits allow. Threads go in step, so a missing barrier
does not show, and a branch that not all of a block take is refused.

NVIDIA, PTX ISA 8.7. Not here: arithmetic (`ptx_arithmetic.py`), which kernels, and what they should
compute (`emulated.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.sharding.kernels.ptx_arithmetic import TYPES, Registers, Values, inside

_GUARD = 256


class Memory:
    """Of the device: tensors side by side, with nothing between them that may be touched."""

    def __init__(self) -> None:
        self._tensors: list[tuple[int, torch.Tensor]] = []
        self._size = _GUARD

    def place(self, tensor: torch.Tensor) -> int:
        """Its address."""
        storage = tensor.untyped_storage()
        for at, known in self._tensors:
            if known.untyped_storage().data_ptr() == storage.data_ptr():
                return at + int(tensor.storage_offset()) * tensor.itemsize
        at, whole = self._size, torch.empty(0, dtype=torch.uint8).set_(storage)
        self._tensors.append((at, whole))
        self._size += -(-storage.nbytes() // _GUARD) * _GUARD + _GUARD
        return at + int(tensor.storage_offset()) * tensor.itemsize

    def load(self) -> tuple[Values, Values]:
        """All of it, and which bytes of it there are."""
        bytes_N, there_N = np.zeros(self._size, np.uint8), np.zeros(self._size, np.bool_)
        for at, tensor in self._tensors:
            bytes_N[at : at + len(tensor)] = tensor.numpy()
            there_N[at : at + len(tensor)] = True
        return bytes_N, there_N

    def store(self, bytes_N: Values) -> None:
        """What a kernel left."""
        for at, tensor in self._tensors:
            tensor.copy_(torch.from_numpy(bytes_N[at : at + len(tensor)]))


@dataclass(frozen=True)
class Instruction:
    """`@guard operation operands;`, the guard perhaps negated."""

    guard: str
    unless: bool
    operation: str
    operands: tuple[str, ...]


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int], list[tuple[str, str]]]:
    """A file with one kernel: instructions, where labels are, parameters with their types."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    parameters = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)", ptx.split(")")[0])
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("ret;") + 4]
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    # Braces of assembly open a scope, those of operands a vector: only the latter have commas or
    # follow an operation.
    # An instruction ends with a semicolon, a label with its line.
    for line in re.split(r"[;\n]", re.sub(r"(?m)^\s*\{|\}\s*$|\{ (?=[a-z]+\.)", "\n", body)):
        text = line.strip()
        if found := re.fullmatch(r"(\$\w+):", text):
            labels[found[1]] = len(code)
        elif text and not text.startswith((".", "}")):
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
            assert found is not None, text
            parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
            operands = tuple(part.strip() for part in parts)
            code.append(Instruction(found[2] or "", found[1] == "!", found[3], operands))
    return code, labels, [(name, kind) for kind, name in parameters]


class Block(Registers):
    """One block of threads."""

    def __init__(
        self, threads: int, shared: int, memory: tuple[Values, Values], place: tuple[int, ...]
    ) -> None:
        super().__init__(threads)
        self._lane = np.arange(threads) % 32
        self._warp = np.arange(threads) // 32 * 32
        self._global, self._there = memory
        self._shared = np.zeros(shared, np.uint8)
        self._shared_there = np.ones(shared, np.bool_)
        self._special = {"%tid.x": np.arange(threads, dtype=np.uint32)}
        self._pending: list[tuple[Values, Values, Values]] = []
        self._groups: list[list[tuple[Values, Values, Values]]] = []
        for axis, at in zip("xyz", place, strict=False):
            self._special[f"%ctaid.{axis}"] = np.full(threads, at, np.uint32)

    def run(
        self, code: Sequence[Instruction], labels: dict[str, int], parameters: dict[str, Values]
    ) -> None:
        """From the first instruction to its end."""
        self._parameters = parameters
        at = 0
        while at < len(code):
            each = code[at]
            at += 1
            self._active = np.ones(self._threads, np.bool_)
            if each.guard:
                self._active = self._register(each.guard) ^ each.unless
                if not self._active.any():
                    continue
            name, *kinds = each.operation.split(".")
            if name in ("bra", "ret"):
                assert self._active.all(), f"a branch that some take: {each}"
                if name == "ret":
                    return
                at = labels[each.operands[0]]
            else:
                with np.errstate(all="ignore"):
                    getattr(self, f"_{name}")(kinds, *each.operands)

    def _mov(self, kinds: Sequence[str], to: str, value: str) -> None:
        kind = self._of(kinds)
        if to.startswith("{"):  # a register in parts
            parts = inside(to)
            whole = self._value(value, kind)
            pieces = whole.view(f"u{np.dtype(kind).itemsize // len(parts)}")
            for number, part in enumerate(parts):
                self._set(part, pieces.reshape(self._threads, -1)[:, number])
        elif value.startswith("{"):
            parts = inside(value)
            size = np.dtype(kind).itemsize // len(parts)
            pieces = np.stack([self._value(part, TYPES[f"u{8 * size}"]) for part in parts], 1)
            self._set(to, np.ascontiguousarray(pieces).view(kind)[:, 0])
        else:
            self._set(to, self._value(value, kind))

    def _ld(self, kinds: Sequence[str], to: str, address: str) -> None:
        kind = self._of(kinds)
        if kinds[0] == "param":
            self._set(
                to, self._parameters[address.strip("[]")].astype(f"u{np.dtype(kind).itemsize}")
            )
            return
        names = inside(to) if to.startswith("{") else [to]
        found = self._gather(kinds[0], self._address(address, kinds[0]), len(names), kind)
        for number, name in enumerate(names):
            self._set(name, found[:, number])

    def _st(self, kinds: Sequence[str], address: str, value: str) -> None:
        kind = self._of(kinds)
        names = inside(value) if value.startswith("{") else [value]
        values = np.stack([self._value(name, kind) for name in names], 1)
        self._scatter(kinds[0], self._address(address, kinds[0]), values)

    def _address(self, text: str, space: str) -> Values:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        assert found is not None, text
        wide = np.int64 if space == "global" else np.uint32
        return self._value(found[1], wide).astype(np.int64) + int(found[2] or 0)

    def _space(self, space: str) -> tuple[Values, Values]:
        if space == "global":
            return self._global, self._there
        return self._shared, self._shared_there

    def _gather(self, space: str, address: Values, count: int, kind: type[Any]) -> Values:
        memory, there = self._space(space)
        n_bytes = count * np.dtype(kind).itemsize
        at = address[:, None] + np.arange(n_bytes)
        self._check(at[self._active], there, n_bytes)
        found = np.zeros((self._threads, n_bytes), np.uint8)
        found[self._active] = memory[at[self._active]]
        return found.view(kind)

    def _scatter(self, space: str, address: Values, values: Values) -> None:
        memory, there = self._space(space)
        bytes_TN = np.ascontiguousarray(values).view(np.uint8)
        at = address[:, None] + np.arange(bytes_TN.shape[1])
        self._check(at[self._active], there, bytes_TN.shape[1])
        memory[at[self._active]] = bytes_TN[self._active]

    @staticmethod
    def _check(at: Values, there: Values, n_bytes: int) -> None:
        assert ((at >= 0) & (at < len(there))).all() and there[at].all(), "outside of memory"
        most = min(n_bytes, 16)
        assert (at[:, 0] % most == 0).all() if most & (most - 1) == 0 else True, "not aligned"

    def _ldmatrix(self, kinds: Sequence[str], to: str, address: str) -> None:
        rows = self._address(address, "shared")
        row, quarter = self._lane // 4, self._lane % 4
        for number, name in enumerate(inside(to) if to.startswith("{") else [to]):
            if "trans" in kinds:
                halves = [
                    self._gather(
                        "shared",
                        rows[self._warp + 8 * number + 2 * quarter + half] + 2 * row, 1, np.uint16
                    )
                    for half in range(2)
                ]  # fmt: skip
                both = np.concatenate(halves, axis=1)
                self._set(name, np.ascontiguousarray(both).view(np.uint32)[:, 0])
            else:
                at = rows[self._warp + 8 * number + row] + 4 * quarter
                self._set(name, self._gather("shared", at, 1, np.uint32)[:, 0])

    def _stmatrix(self, kinds: Sequence[str], address: str, value: str) -> None:
        assert "trans" not in kinds, kinds
        rows = self._address(address, "shared")
        row, quarter = self._lane // 4, self._lane % 4
        for number, name in enumerate(inside(value) if value.startswith("{") else [value]):
            at = rows[self._warp + 8 * number + row] + 4 * quarter
            self._scatter("shared", at, self._value(name, np.uint32)[:, None])

    # Between threads.

    def _bar(self, kinds: Sequence[str], *rest: str) -> None:
        """All are here."""

    def _shfl(
        self, kinds: Sequence[str], to: str, value: str, by: str, clamp: str, mask: str
    ) -> None:
        given, by_T = self._value(value, np.uint32), self._value(by, np.int32)
        assert int(clamp, 0) == 31 and int(mask, 0) % (1 << 32) == (1 << 32) - 1, (clamp, mask)
        source = {"bfly": self._lane ^ by_T, "idx": by_T % 32}[kinds[1]]
        self._set(to.split("|")[0], given[self._warp + source])

    def _redux(self, kinds: Sequence[str], to: str, value: str, mask: str) -> None:
        given = self._value(value, self._of(kinds)).reshape(-1, 32)
        assert kinds[1] == "min", kinds
        found = given.min(axis=1)
        self._set(to, np.repeat(found.astype(given.dtype), 32))

    def _mma(self, kinds: Sequence[str], to: str, a: str, b: str, c: str) -> None:
        bytes_wide = {"m16n8k32": 1, "m16n8k16": 2}[kinds[2]]
        assert kinds[-2] in ("s8", "f16"), kinds
        kind, total = (np.int8, np.int32) if bytes_wide == 1 else (np.float16, np.float32)
        a_TI, b_TI = (self._parts(each, kind) for each in (a, b))
        c_TN = np.stack([self._value(name, total) for name in inside(c)], 1)
        results = np.empty_like(c_TN)
        lane = np.arange(32)
        group, member = lane // 4, lane % 4
        each = 4 // bytes_wide  # of a register; the second half of the columns is in later ones
        for first in range(0, self._threads, 32):
            own = slice(first, first + 32)
            wide = np.int64 if kind is np.int8 else np.float64
            matrix_a, matrix_b = np.zeros((16, 8 * each), wide), np.zeros((8 * each, 8), wide)
            for i in range(4 * each):
                register = i // each
                column = member * each + i % each + 4 * each * (register // 2)
                matrix_a[group + 8 * (register % 2), column] = a_TI[own, i]
            for i in range(2 * each):
                row = member * each + i % each + 4 * each * (i // each)
                matrix_b[row, group] = b_TI[own, i]
            product = matrix_a @ matrix_b
            for i in range(4):
                results[own, i] = c_TN[own, i] + product[group + 8 * (i // 2), member * 2 + i % 2]
        for number, name in enumerate(inside(to)):
            self._set(name, results[:, number])

    def _parts(self, names: str, kind: type[Any]) -> Values:
        words = np.stack([self._value(name, np.uint32) for name in inside(names)], 1)
        return np.ascontiguousarray(words).view(kind)

    def _cp(self, kinds: Sequence[str], *operands: str) -> None:
        """Copies to shared memory, as late as their waits allow."""
        if kinds[1] == "commit_group":
            self._groups.append(self._pending)
            self._pending = []
        elif kinds[1] == "wait_group":
            done = len(self._groups) - int(operands[0], 0)
            for to, copied, active in sum(self._groups[:done], []):
                self._active = active
                self._scatter("shared", to, copied)
            del self._groups[: max(0, done)]
        else:
            size, active = int(operands[2], 0), self._active
            wanted = self._value(operands[3], np.uint32)
            assert np.isin(wanted[active], (0, size)).all(), wanted
            self._active = active & (wanted > 0)
            copied = self._gather("global", self._address(operands[1], "global"), size, np.uint8)
            self._active = active
            self._pending.append((self._address(operands[0], "shared"), copied, active))


def run(
    ptx: str,
    shared: int,
    threads: int,
    grid: Sequence[int],
    values: Sequence[object],
    memory: Memory,
) -> None:
    """A kernel's blocks one after the other; `values` are its parameters, tensors among them, but
    the last two, which are the compiler's own."""
    code, labels, parameters = parse(ptx)
    addressed = [memory.place(each) if isinstance(each, torch.Tensor) else each for each in values]
    bound = {}
    for (name, kind), value in zip(parameters, [*addressed, 0, 0], strict=True):
        single: Values = np.array([value], TYPES[kind])
        bound[name] = np.repeat(single.view(f"u{single.itemsize}"), threads)
    held = memory.load()
    sizes = [*grid, 1, 1][:3]
    for z in range(sizes[2]):
        for y in range(sizes[1]):
            for x in range(sizes[0]):
                Block(threads, shared, held, (x, y, z)).run(code, labels, bound)
    memory.store(held[0])
