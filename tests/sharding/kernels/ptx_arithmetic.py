"""PTX instructions that compute: on the registers of all threads of a block at once.

Not here: memory, branches, what goes from one thread to another (`ptx.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]

TYPES = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16,
    "b16": np.uint16, "f16": np.float16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32,
    "f32": np.float32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.float64,
    "f16x2": np.uint32, "pred": np.bool_,
}  # fmt: skip
_WIDE = {np.int32: np.int64, np.uint32: np.uint64, np.int16: np.int32, np.uint16: np.uint32}
_COMPARED: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


_POISON = 0x7FF7BAAD7FC0BAAD
"""In registers of threads that never wrote them: not a number, and no address."""


class Registers:
    """Of so many threads, by name, as unsigned integers or predicates. Those that are not active
    keep what they have."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._registers: dict[str, Values] = {}
        self._special: dict[str, Values] = {}
        self._active = np.ones(threads, np.bool_)

    def _value(self, operand: str, kind: type[Any]) -> Values:
        if operand.startswith("%"):
            found = self._special.get(operand)
            if found is None:
                found = self._register(operand)
            if found.dtype == np.bool_:
                return found
            size = np.dtype(kind).itemsize
            if found.dtype.itemsize != size:
                found = found.astype(f"u{size}")
            return found.view(kind)
        if operand == "global_smem":
            return np.zeros(self._threads, kind)
        if operand.startswith(("0f", "0d")):
            bits: Values = np.array([int(operand[2:], 16)], f"u{(len(operand) - 2) // 2}")
            if np.dtype(kind).kind == "f":
                bits = bits.view(f"f{(len(operand) - 2) // 2}").astype(kind)
            return np.repeat(bits, self._threads)  # a move takes the bits as they are
        number = int(operand.rstrip("U"), 0)
        size = 8 * np.dtype(kind).itemsize
        if np.dtype(kind) == np.bool_:
            return np.full(self._threads, bool(number))
        return np.full(self._threads, number % (1 << size), f"u{size // 8}").view(kind)

    def _register(self, name: str) -> Values:
        assert name in self._registers, f"nothing wrote {name}"
        return self._registers[name]

    def _set(self, operand: str, value: Values) -> None:
        if operand == "_":
            return
        if value.dtype != np.bool_:
            size = {"%rs": 2, "%rd": 8}.get(operand[:3], 4)
            if value.dtype.itemsize < size:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
            value = value.view(f"u{size}")
        if not self._active.all():
            former = self._registers.get(operand)
            if former is None:  # what a compiler may leave open, if nobody minds in the end
                former = np.full(self._threads, _POISON % (1 << 8 * value.itemsize), value.dtype)
            value = np.where(self._active, value, former)
        self._registers[operand] = value.copy()

    def _of(self, kinds: Sequence[str]) -> type[Any]:
        return TYPES[kinds[-1]]

    def _two(self, kinds: Sequence[str], a: str, b: str) -> tuple[Values, Values]:
        kind = self._of(kinds)
        return self._value(a, kind), self._value(b, kind)

    def _add(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        self._set(to, np.add(*self._two(kinds, a, b)))

    def _sub(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        self._set(to, np.subtract(*self._two(kinds, a, b)))

    def _mul(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        one, other = self._two(kinds, a, b)
        if "wide" in kinds:
            wide = _WIDE[self._of(kinds)]
            one, other = one.astype(wide), other.astype(wide)
        self._set(to, one * other)

    def _mad(self, kinds: Sequence[str], to: str, a: str, b: str, c: str) -> None:
        kind = self._of(kinds)
        one, other = self._two(kinds, a, b)
        if "wide" in kinds:
            kind = _WIDE[kind]
            one, other = one.astype(kind), other.astype(kind)
        self._set(to, one * other + self._value(c, kind))

    def _fma(self, kinds: Sequence[str], to: str, a: str, b: str, c: str) -> None:
        kind = self._of(kinds)
        wide = np.longdouble if kind is np.float64 else np.float64
        one, other = self._two(kinds, a, b)
        sum = one.astype(wide) * other.astype(wide) + self._value(c, kind).astype(wide)
        self._set(to, sum.astype(kind))  # rounded twice, which bounds allow

    def _div(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        one, other = self._two(kinds, a, b)
        whole = one.dtype.kind in "iu"
        self._set(to, np.trunc(one / other).astype(one.dtype) if whole else one / other)

    def _min(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        one, other = self._two(kinds, a, b)
        self._set(to, np.fmin(one, other))  # a NaN is left aside

    def _max(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        one, other = self._two(kinds, a, b)
        self._set(to, np.fmax(one, other))

    def _abs(self, kinds: Sequence[str], to: str, a: str) -> None:
        self._set(to, np.abs(self._value(a, self._of(kinds))))

    def _neg(self, kinds: Sequence[str], to: str, a: str) -> None:
        self._set(to, -self._value(a, self._of(kinds)))

    def _sqrt(self, kinds: Sequence[str], to: str, a: str) -> None:
        self._set(to, np.sqrt(self._value(a, self._of(kinds))))

    def _ex2(self, kinds: Sequence[str], to: str, a: str) -> None:
        self._set(to, np.exp2(self._value(a, self._of(kinds))))

    def _and(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        self._set(to, np.bitwise_and(*self._two(kinds, a, b)))

    def _or(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        self._set(to, np.bitwise_or(*self._two(kinds, a, b)))

    def _xor(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        self._set(to, np.bitwise_xor(*self._two(kinds, a, b)))

    def _not(self, kinds: Sequence[str], to: str, a: str) -> None:
        self._set(to, ~self._value(a, self._of(kinds)))

    def _shl(self, kinds: Sequence[str], to: str, a: str, by: str) -> None:
        value, amount = self._value(a, self._of(kinds)), self._value(by, np.uint32)
        size = 8 * value.itemsize
        shifted = value << np.minimum(amount, size - 1).astype(value.dtype)
        self._set(to, np.where(amount < size, shifted, 0).astype(value.dtype))

    def _shr(self, kinds: Sequence[str], to: str, a: str, by: str) -> None:
        value, amount = self._value(a, self._of(kinds)), self._value(by, np.uint32)
        size = 8 * value.itemsize
        shifted = value >> np.minimum(amount, size - 1).astype(value.dtype)
        beyond = np.where(value < 0, -1, 0) if value.dtype.kind == "i" else 0
        self._set(to, np.where(amount < size, shifted, beyond).astype(value.dtype))

    def _bfe(self, kinds: Sequence[str], to: str, a: str, first: str, count: str) -> None:
        value, size = self._value(a, self._of(kinds)), int(count, 0)
        field = (value.view(np.uint32) >> np.uint32(int(first, 0))) & np.uint32((1 << size) - 1)
        if kinds[-1] == "s32":
            sign = (field >> np.uint32(size - 1)) & 1
            field = np.where(sign == 1, field | np.uint32(-1 << size & 0xFFFFFFFF), field)
        self._set(to, field.astype(np.uint32))

    def _prmt(self, kinds: Sequence[str], to: str, a: str, b: str, selector: str) -> None:
        words = np.stack([self._value(each, np.uint32) for each in (a, b)], 1)
        bytes_T8 = np.ascontiguousarray(words).view(np.uint8)
        chosen = self._value(selector, np.uint32)
        found = np.zeros((self._threads, 4), np.uint8)
        for number in range(4):
            pick = chosen >> np.uint32(4 * number) & np.uint32(15)
            byte = np.take_along_axis(bytes_T8, (pick & 7).astype(np.int64)[:, None], 1)[:, 0]
            sign = np.where(byte >> 7, 255, 0).astype(np.uint8)
            found[:, number] = np.where(pick >> 3, sign, byte)
        self._set(to, found.view(np.uint32)[:, 0])

    def _selp(self, kinds: Sequence[str], to: str, a: str, b: str, which: str) -> None:
        self._set(to, np.where(self._register(which), *self._two(kinds, a, b)))

    def _setp(self, kinds: Sequence[str], to: str, a: str, b: str) -> None:
        self._set(to, _COMPARED[kinds[0].removesuffix("u")](*self._two(kinds, a, b)))

    def _cvt(self, kinds: Sequence[str], to: str, *values: str) -> None:
        target, source = TYPES[kinds[-2]], self._of(kinds)
        if kinds[-2] == "f16x2":
            upper, lower = (self._value(value, source).astype(np.float16) for value in values)
            self._set(to, np.stack((lower, upper), 1).view(np.uint32)[:, 0])
            return
        value = self._value(values[0], source)
        rounded = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
        if kinds[0] in rounded:
            value = rounded[kinds[0]](value)
        self._set(to, value.astype(target))


def inside(vector: str) -> list[str]:
    """The operands of a vector."""
    return [part.strip() for part in vector.strip("{} ").split(",")]
