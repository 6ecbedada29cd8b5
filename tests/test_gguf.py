"""The GGUF reader and writer: agreement with the gguf package, bounds, atomicity."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.gguf_writer import TensorSpec, file_bytes, write_gguf
from quantkit.errors import CheckpointError, OutputError
from quantkit.formats import get_format

METADATA = {
    "general.architecture": gv.string("llama"), "a.u32": gv.u32(7), "a.f32": gv.f32(0.5), "a.bool": gv.boolean(True),
    "a.words": gv.array(gv.STRING, ["x", "größer", ""]), "a.numbers": gv.array(gv.I32, [1, -2, 3]), "a.long": gv.Value(gv.I64, -(1 << 40)),
}  # fmt: skip
SPECS = [
    TensorSpec("w", (3, 5, 32), get_format("Q4_0")),
    TensorSpec("norm", (7,), get_format("F32")),
    TensorSpec("h", (2, 4), get_format("F16")),
]


def write(path, metadata=METADATA, specs=SPECS):
    rng = np.random.default_rng(0)
    with write_gguf(path, metadata, specs) as writer:
        for spec in specs:
            writer.write(spec.name, rng.integers(0, 100, spec.nbytes, dtype=np.uint8))
    return path


def test_round_trip_and_exact_size(tmp_path):
    path = write(tmp_path / "x.gguf")
    assert path.stat().st_size == file_bytes(METADATA, SPECS)
    file = GgufFile(path)
    assert gv.plain(file.metadata) == gv.plain(METADATA)
    assert {n: (e.shape, e.format.name) for n, e in file.entries.items()} == {s.name: (s.shape, s.format.name) for s in SPECS}


def test_the_gguf_package_reads_what_we_write(tmp_path):
    path = write(tmp_path / "x.gguf")
    theirs, ours = gguf.GGUFReader(path), GgufFile(path)
    assert theirs.fields["a.words"].contents() == ["x", "größer", ""]
    for tensor in theirs.tensors:
        entry = ours.entries[tensor.name]
        assert tuple(int(n) for n in reversed(tensor.shape)) == entry.shape
        mine = ours.read_packed(tensor.name, 0, int(np.prod(entry.shape[:-1], dtype=int)))
        assert mine.tobytes() == np.asarray(tensor.data).tobytes()


def test_we_read_what_the_gguf_package_writes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint32("k", 5)
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    writer.add_tensor("t", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert np.array_equal(file.read_rows("t", 1, 3), values[1:3])


def test_nothing_is_left_when_writing_fails(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(RuntimeError), write_gguf(path, METADATA, SPECS) as writer:
        writer.write("w", np.zeros(8, np.uint8))
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="were not written"), write_gguf(path, METADATA, SPECS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    import os

    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: type("S", (), {"f_bavail": 1, "f_frsize": real(path).f_frsize})())
    huge = [TensorSpec("w", (1000, 1000), get_format("F32"))]
    with pytest.raises(OutputError, match="free"), write_gguf(tmp_path / "x.gguf", METADATA, huge):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    import errno

    with pytest.raises(OutputError, match="no space left"), write_gguf(tmp_path / "x.gguf", METADATA, SPECS):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def patched(path, offset, raw):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(raw)] = raw
    path.write_bytes(data)
    return path


def info_offset(path, name):
    """Where the table entry of a tensor begins (at its dimension count)."""
    data = path.read_bytes()
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: patched(p, 0, b"GGML"), "wrong magic"),
        (lambda p: patched(p, 4, struct.pack("<I", 9)), "version 9"),
        (lambda p: patched(p, 8, struct.pack("<Q", 1 << 61)), "do not fit"),
        (lambda p: patched(p, 16, struct.pack("<Q", 1 << 61)), "do not fit"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:60]), "do not fit"),
        (lambda p: patched(p, info_offset(p, "w"), struct.pack("<I", 9)), "9 dimensions"),
        (lambda p: patched(p, info_offset(p, "w") + 4, struct.pack("<Q", 1 << 62)), "impossible shape"),
        (lambda p: patched(p, info_offset(p, "w") + 4, struct.pack("<Q", 33)), "not a multiple"),
        (lambda p: patched(p, info_offset(p, "h") + 4 + 16, struct.pack("<I", 77)), "unknown type 77"),
        (lambda p: patched(p, info_offset(p, "h") + 4 + 20, struct.pack("<Q", 0)), "overlap"),
        (lambda p: patched(p, info_offset(p, "h") + 4 + 20, struct.pack("<Q", 3)), "not aligned"),
        (lambda p: patched(p, info_offset(p, "h") + 4 + 20, struct.pack("<Q", 1 << 50)), "ends at byte"),
    ],
)
def test_bad_files_are_refused(tmp_path, damage, words):
    path = write(tmp_path / "x.gguf")
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        GgufFile(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("fuzz") / "x.gguf")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 400)))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = GgufFile(path)
        for name, entry in file.entries.items():
            if entry.format is not None:
                file.read_rows(name, 0, 1)
    except CheckpointError:
        pass
