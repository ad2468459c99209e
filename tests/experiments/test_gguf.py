"""The GGUF reader on files written here byte by byte, and its block formats against scalar arithmetic."""

import struct

import pytest
import torch

from grass_lib.errors import DataError
from grass_lib.experiments.models.gguf import GGUFFile

HALF = "<e"


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key, kind, packed):
    return text(key) + struct.pack("<I", kind) + packed


def write(path, values, tensors, *, magic=b"GGUF", version=3, alignment=32):
    """Values are packed entries; tensors are ``(name, stored dims, type, bytes)``."""
    head = magic + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join(values)
    offset, data = 0, b""
    for name, dims, kind, content in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        padded = content + b"\0" * (-len(content) % alignment)
        data, offset = data + padded, offset + len(padded)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


def halves(*values):
    return b"".join(struct.pack(HALF, value) for value in values)


def rounded(value):
    return struct.unpack(HALF, struct.pack(HALF, value))[0]


def test_metadata_of_every_kind(tmp_path):
    values = [
        entry("general.architecture", 8, text("llama")),
        entry("a.count", 4, struct.pack("<I", 7)),
        entry("a.float", 6, struct.pack("<f", 0.5)),
        entry("a.flag", 7, b"\x01"),
        entry("a.long", 11, struct.pack("<q", -3)),
        entry("a.numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        entry("a.words", 9, struct.pack("<IQ", 8, 2) + text("Ġthe") + text("")),
        entry("a.lists", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ2B", 0, 2, 4, 5)),
    ]
    file = GGUFFile(write(tmp_path / "x.gguf", values, []))
    assert file.metadata == {
        **{"general.architecture": "llama", "a.count": 7, "a.float": 0.5, "a.flag": True, "a.long": -3},
        **{"a.numbers": [1, -2, 3], "a.words": ["Ġthe", ""], "a.lists": [[4, 5]]},
    }
    assert file.places == {}


def test_blocks_against_scalar_arithmetic(tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = 6  # of 32 values: a matrix of 3 rows and 64 columns
    codes = torch.randint(0, 256, (blocks, 16), generator=generator).tolist()
    bytes8 = torch.randint(-128, 128, (blocks, 32), generator=generator).tolist()
    scales = [rounded(float(value)) for value in torch.randn(blocks, generator=generator)]
    shifts = [rounded(float(value)) for value in torch.randn(blocks, generator=generator)]
    content, wanted = {3: b"", 2: b"", 8: b""}, {3: [], 2: [], 8: []}
    for block in range(blocks):
        d, m = scales[block], shifts[block]
        content[3] += halves(d, m) + bytes(codes[block])
        content[2] += halves(d) + bytes(codes[block])
        content[8] += halves(d) + struct.pack("<32b", *bytes8[block])
        nibbles = [code % 16 for code in codes[block]] + [code // 16 for code in codes[block]]
        wanted[3] += [code * d + m for code in nibbles]
        wanted[2] += [(code - 8) * d for code in nibbles]
        wanted[8] += [code * d for code in bytes8[block]]
    plain = [0.5, -1.25, 3.0, 100.0, -0.0, 7.5]
    tensors = [
        *((f"t{kind}", (64, 3), kind, content[kind]) for kind in (3, 2, 8)),
        ("f32", (3, 2), 0, struct.pack("<6f", *plain)),
        ("f16", (6,), 1, halves(*plain)),
        ("bf16", (2, 3), 30, b"".join(struct.pack("<f", value)[2:] for value in plain)),
    ]
    file = GGUFFile(write(tmp_path / "x.gguf", [], tensors))
    for kind in (3, 2, 8):
        found = file.tensor(f"t{kind}")
        assert found.shape == (3, 64)
        torch.testing.assert_close(found.flatten(), torch.tensor(wanted[kind]), rtol=1e-6, atol=1e-6)
    assert file.tensor("f32").tolist() == [plain[:3], plain[3:]]
    assert file.tensor("f16").tolist() == plain
    assert file.tensor("bf16").tolist() == [plain[:2], plain[2:4], plain[4:]]


def test_alignment_of_the_file_counts(tmp_path):
    values = [entry("general.alignment", 4, struct.pack("<I", 64))]
    tensors = [("a", (1,), 0, struct.pack("<f", 1.5)), ("b", (1,), 0, struct.pack("<f", 2.5))]
    file = GGUFFile(write(tmp_path / "x.gguf", values, tensors, alignment=64))
    assert (file.tensor("a").item(), file.tensor("b").item()) == (1.5, 2.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"magic": b"PK\3\4"}, "begins with"),
        ({"version": 1}, "version 1"),
        ({"tensors": [("a", (32,), 14, b"x" * 100)]}, "type 14"),
        ({"tensors": [("a", (33,), 3, b"x" * 100)]}, "whole blocks of 32"),
        ({"tensors": [("a", (1000,), 0, b"x" * 16)]}, "not whole"),
        ({"values": [entry("a", 99, b"")]}, "value of type 99"),
        ({"values": [entry("a", 8, struct.pack("<Q", 1 << 40))]}, "within its header"),
    ],
)
def test_bad_files_are_named(tmp_path, change, match):
    given = {"values": [], "tensors": [], **change}
    path = write(tmp_path / "bad.gguf", given.pop("values"), given.pop("tensors"), **given)
    with pytest.raises(DataError, match=match) as error:
        GGUFFile(path)
    assert "bad.gguf" in str(error.value)


def test_missing_files_and_tensors(tmp_path):
    with pytest.raises(DataError, match="could not be read"):
        GGUFFile(tmp_path / "none.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\3\0")
    with pytest.raises(DataError, match="within its header"):
        GGUFFile(tmp_path / "short.gguf")
    file = GGUFFile(write(tmp_path / "x.gguf", [], [("a", (1,), 0, struct.pack("<f", 1.0))]))
    with pytest.raises(DataError, match="no tensor 'b'"):
        file.tensor("b")
