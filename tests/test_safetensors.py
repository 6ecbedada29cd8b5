"""The safetensors reader: right on good files, one clear error on bad ones."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.errors import CheckpointError


def write(path, header: dict | bytes, data: bytes = b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_safetensors_wrote(tmp_path):
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(6, dtype=np.float16)}
    save_file(values, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert np.array_equal(file.read_rows("a", 1, 3), values["a"][1:])
    assert np.array_equal(file.read_rows("b", 0, 1)[0], values["b"].astype(np.float32))


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "hole"),
        ({"a": entry(0, 8)}, bytes(4), "ends at byte"),
        ({"a": entry(0, 4)}, bytes(4), "needs 8 bytes"),
        ({"a": entry(-4, 4)}, bytes(4), "negative"),
        ({"a": entry(0, 8, dtype="F31")}, bytes(8), "unknown dtype"),
        ({"a": entry(0, 8)}, bytes(12), "after the last tensor"),
        ({"a": {"shape": [2]}}, b"", "no dtype"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b"{not json", b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "occurs twice"),
    ],
)
def test_bad_headers_are_refused(tmp_path, header, data, words):
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFile(write(tmp_path / "x.safetensors", header, data))


def test_impossible_lengths_and_pointers_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="impossible"):
        SafetensorsFile(path)
    path.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="too few"):
        SafetensorsFile(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        SafetensorsFile(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.float16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        file = SafetensorsFile(path)
        for name, found in file.entries.items():
            if found.dtype in ("F32", "F16", "BF16", "F64") and found.shape:
                file.read_rows(name, 0, 1)
    except CheckpointError:
        pass
