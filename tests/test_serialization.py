"""Safetensors files: both ways between C++ and Python, whatever can be wrong with one, and written whole or not."""

from __future__ import annotations

import json
import os
import stat
import zlib

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableedit_cpp import core
from support.containers import DTYPES, bits, build, header_of, same, tensor_of
from support.sessions import files_no_larger_than


def test_python_reads_what_we_write(tmp_path):
    tensors = {f"{dtype}": tensor_of(dtype, (3, 2), seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), 'Ünïcode "\\\n': torch.ones(1)}
    metadata = {"format": "pt", "text": 'two\nlines "quoted" µ'}
    core.save_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        stored = file.metadata()
    assert stored.pop("stableedit.checksum").startswith("crc32:")
    assert stored == metadata


def test_we_read_what_python_writes(tmp_path):
    tensors = {f"{dtype}": tensor_of(dtype, (2, 5), seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"key": "value"})
    for read, metadata in (
        core.load_safetensors(tmp_path / "a.safetensors"),
        core.parse_safetensors((tmp_path / "a.safetensors").read_bytes()),
    ):
        assert metadata == {"key": "value"}
        assert read.keys() == tensors.keys()
        assert all(same(read[name], tensors[name]) for name in tensors)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    )
)
def test_the_same_bytes_as_the_reference_implementation(tmp_path_factory, spec):
    tensors = {name: tensor_of(dtype, shape) for name, (dtype, shape) in spec.items()}
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    core.save_safetensors(path, tensors)
    ours = path.read_bytes()
    assert ours == safetensors.torch.save(tensors, header_of(ours)["__metadata__"])


def test_layouts_and_views_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.t(), "strided": base[::2, 1::2], "grad": torch.nn.Parameter(base), "same": base}
    core.save_safetensors(tmp_path / "a", tensors)
    read, _ = core.load_safetensors(tmp_path / "a")
    assert all(torch.equal(read[name], tensors[name]) and read[name].is_contiguous() for name in tensors)


def test_checksum_is_zlibs_over_the_documented_sequence(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7)}
    core.save_safetensors(tmp_path / "a", tensors, {"z": "1", "format": "x"})
    crc = zlib.crc32(b"format\0x\0z\x001\0")
    crc = zlib.crc32(b"a\0I64\0\0" + bits(tensors["a"]), crc)
    crc = zlib.crc32(b"b\0F32\x002,3,\0" + bits(tensors["b"]), crc)
    stored = header_of((tmp_path / "a").read_bytes())["__metadata__"]["stableedit.checksum"]
    assert stored == f"crc32:{crc:08x}"


def test_a_checksum_survives_another_writer_and_names_the_damaged_file(tmp_path):
    core.save_safetensors(tmp_path / "a", {"x": torch.arange(100.0)}, {"k": "v"})
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "a"), tmp_path / "b", metadata)
    assert torch.equal(core.load_safetensors(tmp_path / "b")[0]["x"], torch.arange(100.0))
    damaged = bytearray((tmp_path / "b").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "b").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{tmp_path}/b is damaged: its checksum is crc32:\w+, but it was written"):
        core.load_safetensors(tmp_path / "b")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "nothing": (b"", "only 0 bytes"),
    "seven bytes": (b"\0" * 7, "only 7 bytes"),
    "cut off in the header": (build({"x": ENTRY}, bytes(8))[:40], "header"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "announces a header of 9223372036854775808"),
    "header above the limit": ((100_000_001).to_bytes(8, "little") + bytes(100_000_001), "at most 100000000"),
    "not JSON": (build(b"hello"), "not valid JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "zero byte": (build(b"{}\0 and more"), "not valid JSON"),
    "number overflow": (build(b'{"x": 1e999}'), "not valid JSON"),
    "no object": (build([]), "no object"),
    "deep": (build(b'{"x":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
    "deep array": (build(b"[" * 100_000 + b"]" * 100_000), "nested"),
    "twice": (build(b'{"x": %s, "x": %s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)), "two members 'x'"),
    "twice inside": (build(b'{"x": {"dtype": "F32", "dtype": "F64"}}'), "two members 'dtype'"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata no object": (build({"__metadata__": "a"}), "strings to strings"),
    "field missing": (build({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), "must have dtype, shape"),
    "field too many": (build({"x": ENTRY | {"more": 1}}, bytes(8)), "nothing else"),
    "unknown dtype": (build({"x": ENTRY | {"dtype": "F31"}}, bytes(8)), "dtype 'F31'"),
    "negative size": (build({"x": ENTRY | {"shape": [-2]}}, bytes(8)), "not a whole number"),
    "fraction": (build({"x": ENTRY | {"shape": [2.0]}}, bytes(8)), "not a whole number"),
    "offset beyond int64": (build({"x": ENTRY | {"data_offsets": [0, 2**64 - 1]}}, bytes(8)), "not a whole number"),
    "product overflows": (build({"x": ENTRY | {"shape": [2**62, 2**62]}}, bytes(8)), "larger than any memory"),
    "strides overflow": (build({"x": ENTRY | {"shape": [0, 2**62, 2**62]}}, bytes(8)), "larger than any memory"),
    "too many dimensions": (build({"x": ENTRY | {"shape": [1] * 65}}, bytes(8)), "65 dimensions"),
    "shape and offsets": (build({"x": ENTRY | {"shape": [3]}}, bytes(8)), "needs 12 bytes"),
    "backwards": (build({"x": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), "needs 8 bytes"),
    "overlap": (build({"x": ENTRY, "y": ENTRY}, bytes(8)), "must begin at 8"),
    "hole": (build({"x": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "must begin at 0"),
    "too few bytes": (build({"x": ENTRY}, bytes(7)), "has 7 bytes of tensors, but its header describes 8"),
    "bytes too many": (build({"x": ENTRY}, bytes(9)), "has 9 bytes of tensors"),
    "bool of two": (build({"x": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"), "other than 0 and 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ValueError) as from_file:
        core.load_safetensors(tmp_path / "bad")
    with pytest.raises(ValueError) as from_memory:
        core.parse_safetensors(data, "request body")
    for error, source in ((from_file, str(tmp_path / "bad")), (from_memory, "request body")):
        text = str(error.value).split("\nException raised from")[0]
        assert text.startswith(source)
        assert message in text
        assert "\n" not in text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_are_refused_or_harmless(data):
    whole = bytearray(safetensors.torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, {"key": "value"}))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        tensors, _ = core.parse_safetensors(bytes(whole))
    except ValueError as error:
        assert str(error).startswith("the buffer")
    else:  # then the reference implementation must read the same
        expected = safetensors.torch.load(bytes(whole))
        assert tensors.keys() == expected.keys()
        assert all(same(tensors[name], expected[name]) for name in tensors)


# --- atomic writes ---


def test_errors_of_the_file_system_are_pythons_own(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        core.load_safetensors(tmp_path / "absent")
    assert error.value.filename == str(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        core.load_safetensors(tmp_path)
    with pytest.raises(IsADirectoryError):
        core.save_safetensors(tmp_path, {})
    with pytest.raises(FileNotFoundError):
        core.save_safetensors(tmp_path / "absent" / "a", {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Invalid argument"):
        core.load_safetensors(tmp_path / "pipe")
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    core.save_safetensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    for bad, message in (
        ({"x": torch.ones(2, dtype=torch.complex128)}, "cannot hold a tensor of dtype ComplexDouble"),
        ({"__metadata__": torch.ones(2)}, "cannot be named"),
        ({"x": torch.eye(2).to_sparse()}, "must be dense"),
    ):
        with pytest.raises(ValueError, match=message):
            core.save_safetensors(path, bad)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    # A limit on file size stands in for the disk: the write fails half-way, with EFBIG instead of ENOSPC. The signal
    # that comes with it would end a C++ program; Python ignores it.
    path = tmp_path / "a.safetensors"
    core.save_safetensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with files_no_larger_than(4096), pytest.raises(OSError) as caught:
        core.save_safetensors(path, {"x": torch.ones(100_000)})
    assert str(caught.value) == f"[Errno 27] File too large: '{path}'"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        core.save_safetensors(tmp_path / "a", {"x": torch.ones(3)})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
