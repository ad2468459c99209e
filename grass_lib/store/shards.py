"""One shard on the disk: a safetensors file and the note that says that it is finished.

The file is a plain safetensors file, written here rather than by the library, because the library orders tensors by
name, not by layer. Writing it piece by piece also hashes what should be on the disk, without a second copy of the rows
in memory and without reading them back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from grass_lib.errors import StoreError
from grass_lib.files import replacing, sync_folder
from grass_lib.store.formats import Rows, encode
from grass_lib.store.manifest import SCALES, Manifest

BLOCK = 8 << 20
_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Problem:
    """A shard that is not as it should be.

    Attributes:
        number: The shard.
        kind: Whether it is missing, damaged, or could not be read.
        message: What was found and expected.
    """

    number: int
    kind: Literal["missing", "damaged", "unreadable"]
    message: str


@dataclass(frozen=True)
class Part:
    """Where one layer's rows, or their scales, are in a shard file.

    Attributes:
        name: The layer, or that of its scales.
        offset: First byte in the file.
        shape: ``(rows, k_l)``, or ``(rows, scales)``.
        size: Number of bytes.
        dtype: Of its numbers.
    """

    name: str
    offset: int
    shape: tuple[int, int]
    size: int
    dtype: torch.dtype


def data_path(folder: Path, number: int) -> Path:
    """The file with a shard's rows."""
    return folder / f"shard_{number:05d}.safetensors"


def note_path(folder: Path, number: int) -> Path:
    """The note that a shard is finished."""
    return folder / f"shard_{number:05d}.json"


def temporary_path(path: Path) -> Path:
    """The name under which a file is written; the store's lock keeps others from using it."""
    return path.with_name(f".{path.name}.tmp")


def note_bytes(manifest: Manifest, number: int, size: int, sha256: str) -> bytes:
    """Content of a shard's note.

    Args:
        manifest: The store's plan.
        number: The shard.
        size: Bytes of its data file.
        sha256: Of its data file, in hexadecimal.
    """
    rows = manifest.shard_rows(number)
    note = {"bytes": size, "fingerprint": manifest.digest, "first": rows.start, "rows": len(rows), "sha256": sha256}
    return (json.dumps(note, indent=1, sort_keys=True) + "\n").encode()


def shard_parts(manifest: Manifest, number: int) -> tuple[bytes, list[Part]]:
    """Header of a shard's file and the places of its tensors, which follow from the plan alone.

    Returns:
        The first bytes of the file, and one part per tensor in file order.
    """
    rows, tensors = len(manifest.shard_rows(number)), manifest.tensors()
    entries: dict[str, object] = {}
    sizes, end = [rows * width * dtype.itemsize for _, dtype, width in tensors], 0
    for (name, dtype, width), length in zip(tensors, sizes, strict=True):
        entries[name] = {"dtype": _CODES[dtype], "shape": [rows, width], "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offset, parts = len(header), []
    for (name, dtype, width), length in zip(tensors, sizes, strict=True):
        parts.append(Part(name, offset, (rows, width), length, dtype))
        offset += length
    return header, parts


def write_shard(folder: Path, manifest: Manifest, number: int, tensors: Mapping[str, Tensor | Rows]) -> None:
    """Writes a shard, its note last; a shard that was there counts as missing from the start of the call.

    Args:
        folder: The store's folder.
        manifest: Its plan; the tensors have been compared with it.
        number: The shard.
        tensors: ``{layer: (rows, k_l)}`` on the CPU, encoded already or not.

    Raises:
        StoreError: The file could not be written; no temporary file is left, and finished shards are kept.
    """
    path = data_path(folder, number)
    header, parts = shard_parts(manifest, number)
    size = len(header) + sum(part.size for part in parts)
    stored = _stored(manifest, tensors)
    with explained(path, size):
        free = shutil.disk_usage(folder)
        if free.total and free.free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        remove_note(folder, number)
        digest = hashlib.sha256(header)
        with replacing(path, temporary_path(path)) as file:
            file.write(header)
            for part in parts:
                for block in _blocks(stored[part.name]):
                    digest.update(block)
                    file.write(block)
    write_note(folder, number, note_bytes(manifest, number, size, digest.hexdigest()))


def write_note(folder: Path, number: int, content: bytes) -> None:
    """Writes the note that makes a shard count as finished; errors as in `write_shard`."""
    path = note_path(folder, number)
    with explained(path, len(content)), replacing(path, temporary_path(path)) as file:
        file.write(content)


def remove_note(folder: Path, number: int) -> None:
    """Makes a shard count as missing, durably, before its data change."""
    path = note_path(folder, number)
    if path.exists():
        path.unlink()
        sync_folder(folder)


@contextmanager
def explained(path: Path, size: int) -> Iterator[None]:
    """Turns a refusal of the file system while writing ``size`` bytes to ``path`` into a `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise StoreError(
                f"gradient store file {path} ({size:,} bytes) could not be written: {error.strerror or error}; make "
                "the folder writable and run the same command again, finished shards are kept"
            ) from error
        raise StoreError(
            f"gradient store file {path} ({size:,} bytes needed{_free(path.parent)}) could not be written: the disk "
            "(or its quota) is full; free some space and run the same command again, finished shards are kept"
        ) from error


def open_shard(folder: Path, manifest: Manifest, number: int) -> tuple[BinaryIO, dict[str, Part]]:
    """Opens a finished shard and compares its header, size and note, not its checksum, with the plan.

    Returns:
        The unbuffered file, which the caller closes, and the parts by layer, in file order.

    Raises:
        StoreError: The shard is missing, damaged, or cannot be read.
    """
    path = data_path(folder, number)
    if not note_path(folder, number).exists() or not path.exists():
        raise StoreError(
            f"shard {number} is missing in the gradient store {folder}; cache again, then only missing shards are "
            "computed"
        )
    header, parts = shard_parts(manifest, number)
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        size, expected = os.fstat(file.fileno()).st_size, len(header) + sum(part.size for part in parts)
        found = file.read(len(header))
        if size != expected:
            raise _damaged(path, manifest, number, f"it has {size:,} bytes, expected {expected:,}")
        if found != header:
            raise _damaged(path, manifest, number, _difference(found, header))
        _check_note(note_path(folder, number), manifest, number, size)
    except OSError as error:
        file.close()
        raise _unreadable(path, error) from error
    except StoreError:
        file.close()
        raise
    return file, {part.name: part for part in parts}


def fill(file: BinaryIO, path: Path, part: Part, buffer: memoryview) -> None:
    """Reads one part into a buffer of its size.

    Raises:
        StoreError: The file ended early or could not be read.
    """
    try:
        file.seek(part.offset)
        done = 0
        while done < part.size:
            count = file.readinto(buffer[done : done + BLOCK])  # type: ignore[attr-defined]
            if not count:
                raise StoreError(f"{path} ended after {part.offset + done:,} bytes while layer {part.name} was read")
            done += count
    except OSError as error:
        raise _unreadable(path, error) from error


def check_shard(folder: Path, manifest: Manifest, number: int) -> Problem | None:
    """Reads a whole shard and compares it with its checksum.

    Returns:
        What is wrong with it, or None.
    """
    path, note = data_path(folder, number), note_path(folder, number)
    if not note.exists() or not path.exists():
        return Problem(number, "missing", f"shard {number} is missing: there is no {(path, note)[path.exists()].name}")
    try:
        found, size = note.read_bytes(), path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Problem(number, "unreadable", str(_unreadable(path, error)))
    expected = note_bytes(manifest, number, size, digest)
    if found != expected:
        what = f"its SHA-256 is {digest} and it has {size:,} bytes, which {note.name} does not say"
        return Problem(number, "damaged", str(_damaged(path, manifest, number, what)))
    try:
        open_shard(folder, manifest, number)[0].close()
    except StoreError as error:
        return Problem(number, "damaged", str(error))
    return None


def _stored(manifest: Manifest, tensors: Mapping[str, Tensor | Rows]) -> dict[str, Tensor]:
    """The tensors of a shard by name."""
    result: dict[str, Tensor] = {}
    for name in manifest.layers:
        given = tensors[name]
        rows = given if isinstance(given, Rows) else encode(given.detach(), manifest.dtype)
        result[name] = rows.codes
        if rows.scales is not None:
            result[f"{name}{SCALES}"] = rows.scales
    return result


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, byte by byte."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces."""
    flat = raw_bytes(tensor.detach().contiguous())
    for start in range(0, len(flat), BLOCK):
        yield flat[start : start + BLOCK]


def _check_note(note: Path, manifest: Manifest, number: int, size: int) -> None:
    """Raises a StoreError unless the note is that of this shard of this store."""
    content = note.read_bytes()
    try:
        sha256 = str(json.loads(content)["sha256"])
    except (ValueError, KeyError, TypeError):
        sha256 = ""
    expected = note_bytes(manifest, number, size, sha256)
    if content != expected:
        said, wanted = (" ".join(each.decode(errors="replace").split()) for each in (content, expected))
        raise _damaged(note, manifest, number, f"it says {said}, expected {wanted}")


def _free(folder: Path) -> str:
    try:
        return f", {shutil.disk_usage(folder).free:,} free"
    except OSError:
        return ""


def _difference(found: bytes, expected: bytes) -> str:
    """Says in what a header differs, layer by layer where it can be read."""
    try:
        there, wanted = (json.loads(header[8:]) for header in (found, expected))
        for name in wanted:
            if there.get(name) != wanted[name]:
                return f"its header says {there.get(name)} of layer {name}, expected {wanted[name]}"
    except (ValueError, AttributeError):
        pass
    return "its header is not that of a shard of this store"


def _damaged(path: Path, manifest: Manifest, number: int, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}; {manifest.remedy(path.parent, [number])}")


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} could not be read: {error.strerror or error}; make it readable, or delete it and cache again"
    )
