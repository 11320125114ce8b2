"""A GGUF file as metadata and a table of tensors over a memory map, checked before it is trusted.

Not here: torch, dequantising (`quants.py`), or what a key means (`model/arch.py`, `tokenizer.py`).
Nothing is copied but strings; numbers and tensors are read-only views of the map, which stays alive
as long as the last view. It holds no state that could be lost. A file that another process
truncates while it is mapped ends this process (SIGBUS): replace model files by renaming.

The layout, little endian, with string = u64 length, then UTF-8 bytes:

    "GGUF" | u32 version | u64 tensors | u64 keys
    keys    x (string key | u32 value type | value)      array = u32 element type | u64 count | ...
    tensors x (string name | u32 n_dims | u64 dims[n_dims] | u32 type | u64 offset)
    padding to general.alignment, from where the offsets count, then the tensors' bytes

Versions 2 and 3 agree in it. Source: the GGUF specification (ggml, docs/gguf.md). Each part of a
split set has `split.no`, `split.count` and `split.tensors.count`, only the first has other keys.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sharding.errors import CorruptFileError, ModelFileError, UnsupportedModelError
from sharding.gguf.quants import FORMATS, QuantFormat

Value: TypeAlias = bool | int | float | str | list[str] | NDArray[Any]
"""A metadata value. Arrays of numbers are read-only and may be unaligned."""

# Ten times the largest vocabularies; bounds the memory that a huge hostile file spends on strings.
_MAX_HEADER_BYTES = 1 << 28
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NAME_BYTES = 256  # the specification says 64, converters write more
_MAX_PARTS = 99999  # five digits in a part's file name

_CODES = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 10: "u8", 11: "i8"}
_NUMBERS = {kind: np.dtype("<" + code) for kind, code in (_CODES | {7: "?", 12: "f8"}).items()}
"""GGUF's number types as numpy's."""
_BOOL, _STRING, _ARRAY = 7, 8, 9

_NOT_GGUF = {
    b"FUGG": "a byte-swapped (big-endian) GGUF file; convert it to little endian",
    b"tjgg": "a GGML file from before GGUF; convert the original model again",
    b"vers": "perhaps a Git LFS pointer instead of the model; run `git lfs pull`",
    b"<!DO": "perhaps a web page instead of the model; download it again",
}
_DAMAGED = "the file is truncated or damaged, download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `n_bytes` from `offset`, absolute in the file `paths[part]`.

    `shape` is in GGUF's order, the reverse of torch's: `shape[0]` is the contiguous dimension.
    """

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    part: int
    offset: int
    n_bytes: int

    @property
    def cols(self) -> int:
        """Elements of a row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows of all further dimensions together."""
        return math.prod(self.shape[1:])

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


class GGUFFile:
    """An opened GGUF file or split set.

    `metadata` holds the first part's keys. `tensors` maps names to places in file order, part by
    part. `size_bytes` counts all parts. Close it, or leave its `with`, to drop its hold on the
    files; arrays taken from it before stay valid.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.paths = tuple(part.path for part in parts)
        self.version = parts[0].version
        self.metadata = parts[0].metadata
        self.tensors = _merge_tensors(parts)
        self.size_bytes = sum(part.data.size for part in parts)
        self._data = [part.data for part in parts]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map a file, or every part of the split set whose first part `path` is.

        Raises `CorruptFileError` for contradictory bytes, `UnsupportedModelError` for versions and
        types that are not read here, `ModelFileError` for files that cannot be opened.
        """
        first = _map_part(Path(path), 0)
        if first.split_count <= 1:
            return cls([first])
        paths = _paths_of_set(first)
        if first.split_no > 0:
            no = first.split_no + 1
            raise ModelFileError(f"{first.path}: part {no} of a split set; open part 1, {paths[0]}")
        return cls([first, *(_next_part(first, paths[no], no) for no in range(1, len(paths)))])

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "memory") -> GGUFFile:
        """Read a whole file from memory; `name` stands for its path. Raises as `open` does."""
        part = _parse(Path(name), data, 0)
        if part.split_count > 1:
            raise ModelFileError(f"{name}: one part of {part.split_count} cannot be read alone")
        return cls([part])

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, uint8 `[rows, row_bytes]`: a read-only view, nothing is copied.

        Raises `CorruptFileError` if the file has no tensor of that name.
        """
        assert self._data, "the file is closed"
        if name not in self.tensors:
            raise CorruptFileError(f"{self.paths[0]}: tensor {name!r:.80} is missing")
        info = self.tensors[name]
        flat = self._data[info.part][info.offset : info.offset + info.n_bytes]
        return flat.reshape(info.rows, info.format.row_bytes(info.cols))

    def close(self) -> None:
        """Let go of the maps. Closing twice is harmless."""
        self._data.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Part:
    """One file of a set; `split_no` counts from 0. An unsplit file is the whole of a set of one."""

    path: Path
    data: NDArray[np.uint8]
    version: int
    metadata: dict[str, Value]
    tensors: list[TensorInfo]
    split_no: int
    split_count: int


def _map_part(path: Path, part: int) -> _Part:
    try:
        # Before opening: opening a pipe would wait for a writer.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: a folder or device, not a file; give a .gguf file")
        if status.st_size == 0:
            raise CorruptFileError(f"{path}: the file is empty; download it again")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise ModelFileError(f"{path}: cannot open the model file: {reason}") from error
    return _parse(path, data, part)


def _paths_of_set(part: _Part) -> list[Path]:
    count, name = part.split_count, part.path.name
    suffixes = [f"-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    own = suffixes[part.split_no]
    if not name.endswith(own):
        raise ModelFileError(
            f"{part.path}: part {part.split_no + 1} of a split set of {count} must keep its name, "
            f"NAME{own}, to find the others"
        )
    return [part.path.with_name(name.removesuffix(own) + suffix) for suffix in suffixes]


def _next_part(first: _Part, path: Path, no: int) -> _Part:
    if not path.exists():
        raise ModelFileError(
            f"{path}: this part of the split set is missing; download it beside {first.path.name}"
        )
    part = _map_part(path, no)
    if (part.split_no, part.split_count) != (no, first.split_count):
        raise CorruptFileError(
            f"{path}: by its keys part {part.split_no + 1} of {part.split_count}, by its name "
            f"part {no + 1} of {first.split_count}; the parts are not of one set"
        )
    return part


def _merge_tensors(parts: Sequence[_Part]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for info in part.tensors:
            if info.name in tensors:
                raise CorruptFileError(f"{part.path}: tensor {info.name!r:.80} appears twice")
            tensors[info.name] = info
    for part in parts if len(parts) > 1 else ():
        total = part.metadata.get("split.tensors.count", len(tensors))
        if not isinstance(total, int) or total != len(tensors):
            raise CorruptFileError(
                f"{part.path}: split.tensors.count is {total!r:.40}, the {len(parts)} parts hold "
                f"{len(tensors)} tensors; they are not of one set"
            )
    return tensors


def _parse(path: Path, data: bytes | mmap.mmap, part: int) -> _Part:
    header = _Cursor(str(path), data)
    version = _read_version(header)
    n_tensors = header.count("tensor count", least_bytes=8 + 1 + 4 + 8 + 4 + 8)
    n_keys = header.count("key count", least_bytes=8 + 1 + 4 + 1)
    metadata = _read_metadata(header, n_keys)
    alignment = _whole(header, metadata, "general.alignment", 32, 1 << 16)
    if alignment < 8 or alignment & (alignment - 1):
        header.fail(f"general.alignment is {alignment}; a power of two from 8 is expected")
    entries = [_read_tensor(header, part) for _ in range(n_tensors)]
    start = -(-header.position // alignment) * alignment
    tensors = [replace(entry, offset=start + entry.offset) for entry in entries]
    _check_places(header, tensors, alignment)
    split_count = max(_whole(header, metadata, "split.count", 1, _MAX_PARTS), 1)
    split_no = _whole(header, metadata, "split.no", 0, split_count - 1)
    return _Part(path, header.bytes, version, metadata, tensors, split_no, split_count)


def _whole(header: _Cursor, metadata: dict[str, Value], key: str, default: int, most: int) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        header.fail(f"{key} is {value!r:.40}; a whole number in [0, {most}] is expected")
    return value


class _Cursor:
    """Walks over a header; no step leaves the bytes that are there. `what` names what is read."""

    def __init__(self, name: str, data: bytes | mmap.mmap) -> None:
        self.name = name
        self.data = data
        self.bytes: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
        self.position = 0
        self.end = min(len(data), _MAX_HEADER_BYTES)

    def fail(self, message: str) -> NoReturn:
        raise CorruptFileError(f"{self.name}: {message}")

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes`; return where they begin."""
        start, left = self.position, self.end - self.position
        if n_bytes > left:
            self.fail(f"{what} needs {n_bytes} bytes at byte {start}, {left} remain; {_DAMAGED}")
        self.position += n_bytes
        return start

    def whole(self, n_bytes: int, what: str) -> int:
        """An unsigned integer of 4 or 8 bytes."""
        start = self.take(n_bytes, what)
        return int.from_bytes(self.data[start : start + n_bytes], "little")

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that take `least_bytes` each, refused if so many cannot follow."""
        count, left = self.whole(8, what), self.end - self.position
        if count > left // least_bytes:
            least = count * least_bytes
            self.fail(f"{what} is {count}, at least {least} bytes; {left} remain; {_DAMAGED}")
        return count

    def text(self, what: str, most_bytes: int) -> str:
        """A name: never empty, at most `most_bytes`, valid UTF-8."""
        length = self.whole(8, f"the length of {what}")
        if not 1 <= length <= most_bytes:
            self.fail(f"{what} has {length} bytes; 1 to {most_bytes} are expected")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} at byte {start} is not UTF-8: {error.reason}")

    def strings(self, count: int, what: str) -> list[str]:
        """`count` string values; bytes that are not UTF-8 become U+FFFD."""
        data, position, strings = self.data, self.position, []
        # A vocabulary has hundreds of thousands of them: no calls of ours in this loop.
        for index in range(count):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            if position > self.end:
                which = f"string {index} of {count} of {what}" if count > 1 else what
                self.fail(f"{which} needs bytes [{start}, {position}) of {self.end}; {_DAMAGED}")
            strings.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return strings


def _read_version(header: _Cursor) -> int:
    magic = header.data[:4]
    if magic != b"GGUF":
        hint = _NOT_GGUF.get(magic, "the file is damaged or of another kind")
        header.fail(f"not a GGUF file: it begins with {magic!r}, not b'GGUF'; {hint}")
    header.take(4, "the magic")
    version = header.whole(4, "the version")
    if version in (2, 3):
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
        raise UnsupportedModelError(f"{header.name}: {_NOT_GGUF[b'FUGG']}")
    raise UnsupportedModelError(
        f"{header.name}: GGUF version {version}; versions 2 and 3 are read, convert the model again"
    )


def _read_metadata(header: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = header.text(f"metadata key {index} of {count}", _MAX_KEY_BYTES)
        if key in metadata:
            header.fail(f"metadata key {key!r:.80} appears twice")
        metadata[key] = _read_value(header, f"metadata key {key!r:.80}")
    return metadata


def _read_value(header: _Cursor, what: str) -> Value:
    kind = header.whole(4, f"the type of {what}")
    is_array = kind == _ARRAY
    if is_array:
        kind = header.whole(4, f"the element type of {what}")
    if kind == _ARRAY:
        raise UnsupportedModelError(f"{header.name}: {what} is an array of arrays")
    if kind != _STRING and kind not in _NUMBERS:
        header.fail(f"{what} has value type {kind}; 0 to 12 are known")
    least_bytes = 8 if kind == _STRING else _NUMBERS[kind].itemsize
    count = header.count(f"the array length of {what}", least_bytes) if is_array else 1
    if kind == _STRING:
        strings = header.strings(count, what)
        return strings if is_array else strings[0]
    numbers = _read_numbers(header, kind, count, what)
    value: Value = numbers if is_array else numbers[0].item()
    return value


def _read_numbers(header: _Cursor, kind: int, count: int, what: str) -> NDArray[Any]:
    n_bytes = count * _NUMBERS[kind].itemsize
    start = header.take(n_bytes, what)
    flat = header.bytes[start : start + n_bytes]
    if kind == _BOOL and flat.size and flat.max() > 1:
        header.fail(f"{what} holds a truth value of {flat.max()}; 0 and 1 are valid")
    return flat.view(_NUMBERS[kind])


def _read_tensor(header: _Cursor, part: int) -> TensorInfo:
    """One entry of the table, its offset still relative to where the data starts."""
    name = header.text(f"a tensor name at byte {header.position}", _MAX_NAME_BYTES)
    what = f"tensor {name!r:.80}"
    n_dims = header.whole(4, f"the dimension count of {what}")
    if not 1 <= n_dims <= 4:
        header.fail(f"{what} has {n_dims} dimensions; 1 to 4 are expected")
    shape = tuple(header.whole(8, f"the shape of {what}") for _ in range(n_dims))
    type_id = header.whole(4, f"the type of {what}")
    offset = header.whole(8, f"the offset of {what}")
    if 0 in shape:
        header.fail(f"{what} has shape {shape}; every dimension is at least 1")
    if type_id not in FORMATS:
        raise UnsupportedModelError(
            f"{header.name}: {what} has type number {type_id}, no current GGUF format; convert "
            f"the model again, or update Longspan if the format is new"
        )
    format = FORMATS[type_id]
    multiple = format.block_elements
    if shape[0] % multiple:
        header.fail(f"{what} has rows of {shape[0]}; {format.name} needs multiples of {multiple}")
    # Python's integers do not wrap: hostile dimensions give a huge size here, not a small one.
    n_bytes = format.row_bytes(shape[0]) * math.prod(shape[1:])
    return TensorInfo(name, shape, format, part, offset, n_bytes)


def _check_places(header: _Cursor, tensors: Sequence[TensorInfo], alignment: int) -> None:
    """Every tensor aligned, inside the file and clear of the others."""
    end = 0
    for info in sorted(tensors, key=lambda info: info.offset):
        start, before, end = info.offset, end, info.offset + info.n_bytes
        what = f"tensor {info.name!r:.80} in bytes [{start}, {end})"
        if start % alignment:
            header.fail(f"{what} does not begin at a multiple of the alignment {alignment}")
        if start < before:
            header.fail(f"{what} overlaps the tensor before, which ends at {before}")
        if end > len(header.data):
            header.fail(f"{what} exceeds the file's {len(header.data)} bytes; {_DAMAGED}")
