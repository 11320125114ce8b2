"""What the reader makes of good files, and what it says about every kind of bad one.

gguf-py's reader hangs on, misreads or raises bare IndexErrors for several of these.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharding.errors import CorruptFileError, ModelFileError, UnsupportedModelError
from sharding.gguf.reader import GGUFFile
from tests.tiny_gguf import Tensor, file_head, padded, tensor_entry, text, tiny_model, write_gguf

RAMP = np.arange(12, dtype=np.float32)
TENSORS: dict[str, Tensor] = {
    "ramp": (RAMP, (4, 3), "F32"),
    "packed": (bytes(range(80)), (32, 2, 2), "Q4_1"),
}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "u8": np.uint8(255),
    "i8": np.int8(-1),
    "u16": np.uint16(65535),
    "i16": np.int16(-2),
    "u32": np.uint32(1 << 31),
    "i32": np.int32(-3),
    "u64": np.uint64((1 << 64) - 1),
    "i64": np.int64(-(1 << 63)),
    "f32": np.float32(0.5),
    "f64": np.float64(0.1),
    "yes": True,
    "names": ["a", "", "b\u00e9"],
    "numbers": np.array([3, -1, 2], np.int32),
    "flags": np.array([True, False]),
    "nothing": np.array([], np.float32),
}
F32, ARRAY = 0, 9


def with_value(value: bytes) -> bytes:
    """A file whose one key `k` has this value, the type in front."""
    return write_gguf({"k": value}, {})


def with_table(*entries: bytes, data: int = 256) -> bytes:
    """A file of these table entries and so many bytes of data."""
    return padded(file_head(len(entries), 0) + b"".join(entries)) + bytes(data)


def error_of(data: bytes, kind: type[ModelFileError] = CorruptFileError) -> str:
    """The message with which a file is refused."""
    with pytest.raises(kind) as caught:
        GGUFFile.from_bytes(data, "bad.gguf")
    assert str(caught.value).startswith("bad.gguf: ")
    return str(caught.value)


class TestGoodFiles:
    """What is in the file comes out."""

    @pytest.mark.parametrize("version", [2, 3])
    def test_scalars_are_python_values(self, version: int) -> None:
        file = GGUFFile.from_bytes(write_gguf(METADATA, TENSORS, version))
        assert file.version == version
        for key in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64"):
            assert file.metadata[key] == METADATA[key].item(), key
            assert type(file.metadata[key]) is type(METADATA[key].item()), key
        assert file.metadata["yes"] is True
        assert file.metadata["general.architecture"] == "llama"
        assert list(file.metadata) == list(METADATA)

    def test_arrays_are_lists_of_strings_and_read_only_numbers(self) -> None:
        metadata: dict[str, Any] = GGUFFile.from_bytes(write_gguf(METADATA, {})).metadata
        assert metadata["names"] == ["a", "", "b\u00e9"]
        for key in ("numbers", "flags", "nothing"):
            np.testing.assert_array_equal(metadata[key], METADATA[key])
            assert metadata[key].dtype == METADATA[key].dtype
            assert not metadata[key].flags.writeable

    def test_strings_that_are_not_utf_8_are_mended(self) -> None:
        value = struct.pack("<IQ", 8, 3) + b"a\xffb"
        assert GGUFFile.from_bytes(with_value(value)).metadata["k"] == "a\ufffdb"

    def test_tensors_are_described_in_file_order(self) -> None:
        file = GGUFFile.from_bytes(write_gguf({}, TENSORS))
        assert list(file.tensors) == ["ramp", "packed"]
        packed = file.tensors["packed"]
        assert (packed.shape, packed.format.name, packed.part) == ((32, 2, 2), "Q4_1", 0)
        assert (packed.cols, packed.rows, packed.elements, packed.n_bytes) == (32, 4, 128, 80)

    @pytest.mark.parametrize("alignment", [8, 32, 4096])
    def test_raw_is_a_read_only_view_of_rows(self, alignment: int) -> None:
        file = GGUFFile.from_bytes(write_gguf({}, TENSORS, alignment=alignment))
        assert file.tensors["packed"].offset % alignment == 0
        assert file.raw("packed").tolist() == np.arange(80).reshape(4, 20).tolist()
        np.testing.assert_array_equal(file.raw("ramp").view(np.float32), RAMP.reshape(3, 4))
        assert not file.raw("ramp").flags.writeable

    def test_a_format_known_but_not_computed_still_parses(self) -> None:
        tensors = {"x": (bytes(66), (256,), "IQ2_XXS"), "y": (bytes(24), (3,), "F64")}
        file = GGUFFile.from_bytes(write_gguf({}, tensors))
        assert [info.format.computed for info in file.tensors.values()] == [False, False]

    def test_a_missing_tensor_is_named(self) -> None:
        with pytest.raises(CorruptFileError, match="'output.weight' is missing"):
            GGUFFile.from_bytes(write_gguf({}, TENSORS)).raw("output.weight")

    def test_a_tiny_model_of_each_tokenizer_is_a_valid_file(self) -> None:
        for tokenizer in ("bpe", "spm"):
            file = GGUFFile.from_bytes(tiny_model(tokenizer=tokenizer, tied=False))
            assert file.tensors["output.weight"].shape == file.tensors["token_embd.weight"].shape


class TestOpening:
    """Files on disk, one by one."""

    def test_a_mapped_file_reads_like_its_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "tiny.gguf"
        data = write_gguf(METADATA, TENSORS)
        path.write_bytes(data)
        with GGUFFile.open(path) as file:
            assert (file.paths, file.size_bytes) == ((path,), len(data))
            assert file.raw("packed").tobytes() == bytes(range(80))

    def test_arrays_outlive_the_file(self, tmp_path: Path) -> None:
        """Unmapping under a live view would end the process."""
        path = tmp_path / "tiny.gguf"
        path.write_bytes(write_gguf(METADATA, TENSORS))
        with GGUFFile.open(str(path)) as file:
            raw = file.raw("packed")
        file.close()
        assert raw.tobytes() == bytes(range(80))

    @pytest.mark.parametrize(("name", "reason"), [("no.gguf", "No such file"), ("", "folder")])
    def test_a_path_that_is_no_file(self, tmp_path: Path, name: str, reason: str) -> None:
        with pytest.raises(ModelFileError, match=reason) as caught:
            GGUFFile.open(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)

    def test_a_pipe_is_refused_instead_of_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ModelFileError, match="not a file"):
            GGUFFile.open(tmp_path / "pipe")

    def test_a_file_that_may_not_be_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Root may read everything, so the refusal is played."""

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        (tmp_path / "secret.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(ModelFileError, match="Permission denied"):
            GGUFFile.open(tmp_path / "secret.gguf")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.gguf").touch()
        with pytest.raises(CorruptFileError, match="empty"):
            GGUFFile.open(tmp_path / "empty.gguf")


class TestHeader:
    """Magic, version and counts."""

    @pytest.mark.parametrize(
        ("start", "hint"),
        [
            (b"FUGG", "big-endian"),
            (b"tjgg", "before GGUF"),
            (b"version https://git-lfs", "git lfs pull"),
            (b"<!DOCTYPE html>", "web page"),
            (b"\0\0\0\0", "another kind"),
            (b"", "begins with b''"),
        ],
    )
    def test_other_files_are_recognised(self, start: bytes, hint: str) -> None:
        assert hint in error_of(start)

    @pytest.mark.parametrize(
        ("version", "hint"),
        [(1, "GGUF version 1"), (4, "GGUF version 4"), (0, "version 0"), (3 << 24, "big-endian")],
    )
    def test_versions_that_are_not_read(self, version: int, hint: str) -> None:
        assert hint in error_of(file_head(0, 0, version), UnsupportedModelError)

    @pytest.mark.parametrize("count", [3, 1 << 31, 1 << 62, (1 << 64) - 1])
    def test_counts_beyond_the_file(self, count: int) -> None:
        assert f"tensor count is {count}" in error_of(file_head(count, 0) + bytes(40))
        assert f"key count is {count}" in error_of(file_head(0, count) + bytes(40))

    @pytest.mark.parametrize("version", [2, 3])
    def test_every_truncation_is_refused(self, version: int) -> None:
        """No cut, not even inside the last tensor, may load as a smaller model."""
        data = write_gguf(METADATA, TENSORS, version)
        end = GGUFFile.from_bytes(data).tensors["packed"]
        for length in range(end.offset + end.n_bytes):
            error_of(data[:length])
        GGUFFile.from_bytes(data[: end.offset + end.n_bytes])


class TestMetadata:
    """Keys and values."""

    @pytest.mark.parametrize("count", [50, 1 << 32, 1 << 61, 1 << 62, 1 << 63, (1 << 64) - 1])
    @pytest.mark.parametrize("kind", [0, 4, 7, 8, 12])
    def test_an_array_longer_than_the_file(self, kind: int, count: int) -> None:
        """2^63 made gguf-py loop for ever; 2^61 x 8 bytes wraps to 0 in 64 bits."""
        message = error_of(with_value(struct.pack("<IIQ", ARRAY, kind, count)))
        assert f"array length of metadata key 'k' is {count}" in message

    @pytest.mark.parametrize("length", [100, 1 << 62, (1 << 64) - 8, (1 << 64) - 1])
    def test_a_string_longer_than_the_file(self, length: int) -> None:
        """2^62 passed silently in gguf-py; lengths near 2^64 wrap when added to a position."""
        message = error_of(with_value(struct.pack("<IQ", 8, length)))
        assert "'k'" in message
        assert str(length + 45) in message

    def test_a_string_in_an_array_longer_than_the_file(self) -> None:
        value = struct.pack("<IIQ", ARRAY, 8, 2) + text("good") + struct.pack("<Q", 1 << 62)
        assert "string 1 of 2" in error_of(with_value(value))

    @pytest.mark.parametrize("kind", [13, 255, (1 << 32) - 1])
    def test_an_unknown_value_type(self, kind: int) -> None:
        assert f"value type {kind}" in error_of(with_value(struct.pack("<I", kind) + bytes(8)))
        array = struct.pack("<IIQ", ARRAY, kind, 1) + bytes(8)
        assert f"value type {kind}" in error_of(with_value(array))

    def test_an_array_of_arrays(self) -> None:
        """Nested a thousand deep it would exhaust a recursive reader's stack."""
        nested = struct.pack("<IIQ", ARRAY, ARRAY, 1) * 1000
        assert "array of arrays" in error_of(with_value(nested), UnsupportedModelError)

    @pytest.mark.parametrize("value", [struct.pack("<IB", 7, 2), struct.pack("<IIQB", 9, 7, 1, 9)])
    def test_a_truth_value_that_is_neither(self, value: bytes) -> None:
        assert "truth value" in error_of(with_value(value))

    def test_a_key_that_appears_twice(self) -> None:
        """Which of the two counts would differ from reader to reader."""
        pair = text("same") + struct.pack("<IB", 0, 1)
        assert "'same' appears twice" in error_of(file_head(0, 2) + pair + pair)

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            (struct.pack("<Q", 0), "has 0 bytes"),
            (struct.pack("<Q", 1 << 16) + b"k" * (1 << 16), "has 65536 bytes"),
            (struct.pack("<Q", 2) + b"\xc3\x28", "not UTF-8"),
            (struct.pack("<Q", 1000), "needs 1000 bytes"),
        ],
        ids=["empty", "long", "invalid", "cut"],
    )
    def test_a_bad_key(self, key: bytes, hint: str) -> None:
        message = error_of(file_head(0, 1) + key + struct.pack("<IQ", 0, 0))
        assert "metadata key 0 of 1" in message
        assert hint in message

    @pytest.mark.parametrize(
        "alignment", [0, 1, 4, 12, 33, 1 << 17, 1 << 31, -32, 32.0, True, "32", np.arange(9)]
    )
    def test_an_impossible_alignment(self, alignment: object) -> None:
        assert "general.alignment is" in error_of(write_gguf({"general.alignment": alignment}, {}))


class TestTensorTable:
    """Entries and the places they claim."""

    @pytest.mark.parametrize("n_dims", [0, 5, 1 << 20, (1 << 32) - 1])
    def test_a_dimension_count_outside_1_to_4(self, n_dims: int) -> None:
        entry = text("x") + struct.pack("<I", n_dims) + bytes(60)
        assert f"'x' has {n_dims} dimensions" in error_of(with_table(entry))

    @pytest.mark.parametrize("shape", [(0,), (4, 0), (1, 1, 1, 0)])
    def test_a_dimension_of_zero(self, shape: tuple[int, ...]) -> None:
        assert f"'x' has shape {shape}" in error_of(with_table(tensor_entry("x", shape, F32, 0)))

    @pytest.mark.parametrize(
        "shape",
        [(1 << 32, 1 << 32), (1 << 62,), (1 << 16,) * 4, (1 << 63, 2), (3, ((1 << 64) + 2) // 3)],
    )
    def test_dimensions_that_wrap_modulo_2_64(self, shape: tuple[int, ...]) -> None:
        """With 64-bit products these have 0 to 8 bytes and fit any file."""
        message = error_of(with_table(tensor_entry("x", shape, F32, 0)))
        assert "tensor 'x' in bytes [" in message
        assert "exceeds the file's" in message

    def test_rows_that_are_no_whole_number_of_groups(self) -> None:
        message = error_of(with_table(tensor_entry("x", (48, 2), 2, 0)))
        assert "rows of 48; Q4_0 needs multiples of 32" in message

    @pytest.mark.parametrize("type_id", [4, 31, 38, 1000, (1 << 32) - 1])
    def test_an_unknown_type(self, type_id: int) -> None:
        data = with_table(tensor_entry("x", (4,), type_id, 0))
        assert f"'x' has type number {type_id}" in error_of(data, UnsupportedModelError)

    @pytest.mark.parametrize("offset", [288, 1 << 63, (1 << 64) - 32])
    def test_an_offset_outside_the_file(self, offset: int) -> None:
        """Near 2^64 the offset wraps to a place before the data."""
        message = error_of(with_table(tensor_entry("x", (4,), F32, offset)))
        assert f"[{64 + offset}, {80 + offset}) exceeds" in message

    @pytest.mark.parametrize("offset", [1, 16, 31])
    def test_an_offset_off_the_alignment(self, offset: int) -> None:
        assert "alignment 32" in error_of(with_table(tensor_entry("x", (4,), F32, offset)))

    @pytest.mark.parametrize("offsets", [(0, 0), (0, 32), (32, 0)])
    def test_tensors_that_overlap(self, offsets: tuple[int, int]) -> None:
        entries = (
            tensor_entry(name, (16,), F32, at) for name, at in zip("xy", offsets, strict=True)
        )
        assert "overlaps the tensor before" in error_of(with_table(*entries))

    def test_a_name_that_appears_twice(self) -> None:
        entries = (tensor_entry("x", (4,), F32, offset) for offset in (0, 32))
        assert "tensor 'x' appears twice" in error_of(with_table(*entries))

    @pytest.mark.parametrize("name", ["", "x" * 257])
    def test_a_name_of_bad_length(self, name: str) -> None:
        message = error_of(with_table(tensor_entry(name, (4,), F32, 0), data=512))
        assert f"a tensor name at byte 24 has {len(name)} bytes" in message

    def test_a_name_that_is_not_utf_8(self) -> None:
        entry = tensor_entry("xy", (4,), F32, 0).replace(b"xy", b"\xff\xfe")
        assert "not UTF-8" in error_of(with_table(entry))


def write_set(folder: Path, totals: tuple[int, ...] = (3, 3, 3)) -> list[Path]:
    """Three files of one tensor each; `totals` is what each says about the number of tensors."""
    paths = [folder / f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for no, (path, total) in enumerate(zip(paths, totals, strict=True)):
        split: dict[str, Any] = {"split.no": np.uint16(no), "split.count": np.uint16(3)}
        split["split.tensors.count"] = np.int32(total)
        tensor: Tensor = (np.full(4, no, np.float32), (4,), "F32")
        extra = {"general.architecture": "llama"} if no == 0 else {}
        path.write_bytes(write_gguf(extra | split, {f"t{no}": tensor}))
    return paths


class TestSplitSets:
    """NAME-00001-of-0000N.gguf and its siblings."""

    def test_the_first_part_opens_all(self, tmp_path: Path) -> None:
        paths = write_set(tmp_path)
        with GGUFFile.open(paths[0]) as file:
            assert file.paths == tuple(paths)
            assert file.size_bytes == sum(path.stat().st_size for path in paths)
            assert file.metadata["general.architecture"] == "llama"
            assert [(info.name, info.part) for info in file.tensors.values()] == [
                ("t0", 0), ("t1", 1), ("t2", 2),
            ]  # fmt: skip
            assert [file.raw(f"t{no}").view(np.float32)[0, 0] for no in range(3)] == [0, 1, 2]

    def test_another_part_names_the_first(self, tmp_path: Path) -> None:
        paths = write_set(tmp_path)
        with pytest.raises(ModelFileError, match=f"part 2 of .* open part 1, {paths[0]}"):
            GGUFFile.open(paths[1])

    def test_a_missing_part_is_named(self, tmp_path: Path) -> None:
        paths = write_set(tmp_path)
        paths[2].unlink()
        with pytest.raises(ModelFileError, match=f"{paths[2]}: .* missing"):
            GGUFFile.open(paths[0])

    @pytest.mark.parametrize("name", ["model.gguf", "m-00002-of-00003.gguf"])
    def test_a_renamed_part_cannot_find_the_others(self, tmp_path: Path, name: str) -> None:
        renamed = write_set(tmp_path)[0].replace(tmp_path / name)
        with pytest.raises(ModelFileError, match=r"must keep its name, NAME-00001-of-00003\.gguf"):
            GGUFFile.open(renamed)

    @pytest.mark.parametrize("other", [0, 2])
    def test_a_part_in_the_place_of_another(self, tmp_path: Path, other: int) -> None:
        paths = write_set(tmp_path)
        paths[1].write_bytes(paths[other].read_bytes())
        with pytest.raises(
            CorruptFileError, match=f"keys part {other + 1} of 3, by its name part 2"
        ):
            GGUFFile.open(paths[0])

    @pytest.mark.parametrize("totals", [(4, 4, 4), (3, 3, 2)])
    def test_parts_that_disagree(self, tmp_path: Path, totals: tuple[int, ...]) -> None:
        with pytest.raises(CorruptFileError, match="hold 3 tensors"):
            GGUFFile.open(write_set(tmp_path, totals)[0])

    def test_a_tensor_in_two_parts(self, tmp_path: Path) -> None:
        paths = write_set(tmp_path)
        paths[2].write_bytes(paths[2].read_bytes().replace(b"t2", b"t1"))
        with pytest.raises(CorruptFileError, match=f"{paths[2]}: tensor 't1' appears twice"):
            GGUFFile.open(paths[0])

    def test_one_part_in_memory_is_refused(self, tmp_path: Path) -> None:
        data = write_set(tmp_path)[0].read_bytes()
        assert "one part of 3" in error_of(data, ModelFileError)
